"""What a Frechet distance must not do to a run: mistake its precision, grow, keep signals waiting, end it."""

import json
import os
import signal

import pytest
import torch
from runs import ar_module, image_data, token_data, tokenizer_module, trainer
from tiny_models import fit_ar
from torch.nn.modules.module import register_module_forward_hook

from dar_lightning.cli import main
from dar_lightning.errors import UserError
from dar_lightning.metrics import images as image_sets
from dar_lightning.training.callbacks import GenerationFID, LastStepCheckpoint, ReconstructionFID, StopOnSignal


class Layer(torch.nn.Linear):
    """Of the feature network, to be told from the models'."""


class OneLayer(torch.nn.Module):
    """Colours through a matrix product, which autocast would round."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = Layer(3, 3)

    def forward(self, images):
        return self.layer(images.float().mean((2, 3)))


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
@pytest.mark.parametrize("kind", ["tokenizer", "ar"])
def test_images_are_made_in_the_precision_that_is_written_down(
    images, tokens, tokenizer_folder, tmp_path, kind, precision, dtype
):
    network = f"{__name__}.OneLayer"
    if kind == "ar":
        module, data = ar_module(), token_data(tokens)
        callback = GenerationFID(tokenizer_folder, images[1], 4, network, batch_size=2)
    else:
        module, data, callback = tokenizer_module(), image_data(images), ReconstructionFID(None, network)
    found = {Layer: set(), torch.nn.Linear: set()}

    def note(layer, inputs, output):
        if type(layer) in found:
            found[type(layer)].add(output.dtype)

    hook = register_module_forward_hook(note)
    try:
        trainer(callback, default_root_dir=tmp_path, precision=precision).validate(module, data, verbose=False)
    finally:
        hook.remove()
    assert found == {Layer: {torch.float32}, torch.nn.Linear: {dtype}}


def test_a_signal_does_not_wait_for_all_images(images, tokens, tokenizer_folder, tmp_path, monkeypatch, capsys):
    draw_rows, drawn = image_sets.draw_rows, []

    def signalled(*arguments):
        drawn.append(None)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return draw_rows(*arguments)

    monkeypatch.setattr(image_sets, "draw_rows", signalled)
    saving = LastStepCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=0)
    callback = GenerationFID(tokenizer_folder, images[1], 40, "color_edges", batch_size=2)
    options = dict(default_root_dir=tmp_path, enable_checkpointing=True, max_steps=4, val_check_interval=2)
    with pytest.raises(SystemExit) as caught:
        trainer(callback, StopOnSignal(), saving, **options).fit(ar_module(), token_data(tokens))
    assert caught.value.code == 128 + signal.SIGUSR1
    assert len(drawn) == 3, "of 20 batches"
    assert "SIGUSR1: stopped after step 2, saved in" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_costs_a_line(images, tmp_path, capsys):
    (tmp_path / "evaluation").write_text("a file, where a folder belongs")
    callback = ReconstructionFID(None, "color_edges")
    fit = trainer(callback, default_root_dir=tmp_path, max_steps=2, val_check_interval=1)
    fit.fit(tokenizer_module(), image_data(images, 3))
    assert fit.global_step == 2
    value = fit.callback_metrics["val/rFD-color_edges"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(said) == 2
    assert said[1].startswith(f"WARNING: cannot write {tmp_path}/evaluation/rFD-color_edges-0000002.json: ")
    assert said[1].endswith(f"val/rFD-color_edges of step 2 is {float(value):.6g}; training goes on")
    with pytest.raises(UserError, match="cannot write"):
        fit.validate(tokenizer_module(), image_data(images, 3), verbose=False)


def test_a_validation_leaves_no_images_errors_behind(images, tmp_path):
    callback = ReconstructionFID(None, "color_edges")
    trainer(callback, default_root_dir=tmp_path).validate(tokenizer_module(), image_data(images, 3), verbose=False)
    assert not any(
        torch.cat([tensor.flatten() for tensor in state]).numel()
        for metric in callback._metrics.values()
        for state in metric.metric_state.values()
        if isinstance(state, list) and state
    )


def test_labels_tell_two_of_a_kind_apart(images, tokens, tokenizer_folder, tmp_path):
    def two(module, data, kind, *arguments):
        callbacks = [kind(*arguments), kind(*arguments, seed=3, label="other")]
        return trainer(*callbacks, default_root_dir=tmp_path).validate(module, data, verbose=False)[0]

    logged = two(ar_module(), token_data(tokens), GenerationFID, tokenizer_folder, images[1], 4, "color_edges")
    logged |= two(tokenizer_module(), image_data(images, 3), ReconstructionFID, 5, "color_edges")
    for name in ("gFD-color_edges", "rFD-color_edges", "rPSNR", "rSSIM"):
        assert logged[f"val/{name}"] != logged[f"val/{name}-other"]
    files = sorted(path.name for path in (tmp_path / "evaluation").iterdir())
    names = [f"{kind}FD-color_edges-{step}.json" for kind in "gr" for step in ("0000000", "other-0000000")]
    assert files == sorted(names)
    figures = json.loads((tmp_path / "evaluation" / "rFD-color_edges-other-0000000.json").read_text())["metrics"]
    assert figures["rPSNR"] == pytest.approx(logged["val/rPSNR-other"]), "as without a label: dar compare knows it"
    callbacks = [ReconstructionFID(2, "color_edges"), ReconstructionFID(5, f"{__name__}.OneLayer")]
    with pytest.raises(UserError, match=r"two of them log val/rPSNR, give one another label"):
        trainer(*callbacks, default_root_dir=tmp_path).validate(tokenizer_module(), image_data(images))
    with pytest.raises(UserError, match=r"label is 'a/b'"):
        ReconstructionFID(label="a/b")


def test_two_of_a_kind_without_labels_are_one_line(images, tokens, tokenizer_folder, tmp_path, capsys):
    one = [
        "--trainer.callbacks+=dar_lightning.training.callbacks.GenerationFID",
        "--trainer.callbacks.features=color_edges",
    ]
    one += [f"--trainer.callbacks.tokenizer={tokenizer_folder}", f"--trainer.callbacks.reference={images[1]}"]
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in (*fit_ar(*tokens, tmp_path, max_steps=1), *one, *one)])
    assert caught.value.code == 2
    assert "dar fit: trainer.callbacks: two of type GenerationFID" in capsys.readouterr().err.splitlines()[-1]
