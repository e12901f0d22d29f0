"""Frechet distances in validation: against plain numpy and `dar evaluate`, on EMA weights, on two ranks.

And what they must not do to a run: mistake its precision, grow, keep signals waiting, end it.
"""

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from refusals import refusal, refused
from tiny_models import CLASSES, SIZE, fit_ar, make_tokenizer, picture
from tiny_training import ar_module, image_data, token_data, tokenizer_module, trainer
from torch.nn.modules.module import register_module_forward_hook
from torchmetrics.functional.image import structural_similarity_index_measure

from dar_lightning import DARPipeline, SequentialDiffusionTokenizer
from dar_lightning.commands.compare import compare
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.metrics import images as image_sets
from dar_lightning.metrics.features import FrozenNetwork, load_features
from dar_lightning.records.pixels import image_digests, set_sha256
from dar_lightning.tokenizer import diffusion_step
from dar_lightning.training.callbacks import (
    EMA,
    GenerationFID,
    LastStepCheckpoint,
    ReconstructionFID,
    Samples,
    StopOnSignal,
)
from dar_lightning.training.optim import OptimizerConfig
from dar_lightning.weights.lightning import load_lightning_checkpoint


class Layer(torch.nn.Linear):
    """Of the feature network, to be told from the models': autocast would round it."""


class Colors(torch.nn.Module):
    """Mean and spread of each channel, (B, 6): features that numpy computes too."""

    def __init__(self):
        super().__init__()
        self.layer = Layer(6, 6, bias=False)
        torch.nn.init.eye_(self.layer.weight)

    def forward(self, images):
        pixels = images.float()
        return self.layer(torch.cat([pixels.mean((2, 3)), pixels.std((2, 3), correction=0)], dim=1))


class Shades(Colors):
    """The same under another name."""


NETWORK = f"{__name__}.Colors"


def numpy_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Of images (n, H, W, 3), by the formula of Heusel et al."""
    one, two = (np.concatenate([x.mean((1, 2)), x.std((1, 2))], axis=1) for x in (first.astype(float), second))
    cov1, cov2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    return np.square(one.mean(0) - two.mean(0)).sum() + np.trace(cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real)


def originals(count: int) -> np.ndarray:
    return np.stack([np.asarray(picture(number)) for number in range(count)])


def reconstructed(tokenizer, count: int, seed: int, solver: str) -> np.ndarray:
    """One image at a time, noise from the documented seed."""
    images = []
    for number in range(count):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + number) % 2**32)
        noise = torch.randn(1, 3, SIZE, SIZE, generator=generator)
        pixels = torch.from_numpy(np.array(picture(number))).permute(2, 0, 1)[None].float()
        decoded = tokenizer.detokenize(tokenizer.tokenize(pixels / 127.5 - 1), noise, solver)
        images.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().numpy()[0].transpose(1, 2, 0))
    return np.stack(images)


def run(folder: Path, *callbacks, save_every: int | None = None, **options):
    """A Trainer whose metrics go to folder/evaluation, and its checkpoints into the folder."""
    if save_every:
        saving = LastStepCheckpoint(dirpath=folder, every_n_train_steps=save_every, save_top_k=0)
        callbacks, options = (*callbacks, saving), options | {"enable_checkpointing": True}
    return trainer(*callbacks, default_root_dir=folder, **options)


def written(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "evaluation").iterdir())}


class Watch(Callback):
    """Lets frozen tokenizers decode by steps that are kept, as on CUDA, and counts those that are idle."""

    def __init__(self, *callbacks):
        self.callbacks, self.idle = callbacks, []

    def on_validation_start(self, trainer, pl_module):
        for tokenizer in (getattr(callback, "_tokenizer", None) or callback.tokenizer for callback in self.callbacks):
            tokenizer.decoder.static = True

    def on_validation_batch_end(self, *_):
        self.idle.append(len(diffusion_step.steps.idle))


def test_no_step_of_a_frozen_tokenizer_is_kept_after_validation(images, tokens, tokenizer_folder, tmp_path):
    drawing = GenerationFID(tokenizer_folder, images[1], 2, NETWORK, batch_size=2)
    samples = Samples(tokenizer_folder, classes=[0], per_class=1)
    samples.tokenizer = make_tokenizer()
    watch = Watch(drawing, samples)
    run = trainer(drawing, samples, watch, folder=tmp_path, limit_val_batches=1)
    run.validate(ar_module(), token_data(tokens), verbose=False)
    assert watch.idle == [2]
    assert not diffusion_step.steps.idle


@pytest.mark.parametrize("count", [7, 5])
def test_reconstruction_fid_is_numpys_and_that_of_dar_evaluate(images, tmp_path, capsys, count):
    module = tokenizer_module()
    callback = ReconstructionFID(None if count == 7 else count, NETWORK, seed=3, solver="euler")
    logged = run(tmp_path, callback).validate(module, image_data(images, 3), verbose=False)[0]
    decoded = reconstructed(module.tokenizer, count, 3, "euler")
    errors = ((decoded - originals(count)) ** 2).mean((1, 2, 3))
    pair = [torch.from_numpy(array).permute(0, 3, 1, 2).float() for array in (decoded, originals(count))]
    expected = {f"rFD-{NETWORK}": numpy_distance(decoded, originals(count))}
    expected["rPSNR"] = np.mean(10 * np.log10(255**2 / errors))
    expected["rSSIM"] = structural_similarity_index_measure(*pair, data_range=255.0).item()
    assert {name: logged[f"val/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    result = written(tmp_path)[f"rFD-{NETWORK}-0000000"]
    assert result["metrics"] == pytest.approx(expected, rel=1e-5)
    samples, reference = result["protocol"]["samples"], result["protocol"]["reference"]
    assert (samples["n"], samples["seed"], samples["solver"], samples["steps"]) == (count, 3, "euler", 4)
    facts = {"shards": images[1], "crop": f"ADM centre crop to {SIZE}", "n": count}
    assert reference == facts | {"sha256": set_sha256(image_digests(originals(count)))}
    if count == 7:
        np.savez(tmp_path / "same.npz", arr_0=decoded.astype(np.uint8))
        evaluate(str(tmp_path / "same.npz"), images[1], NETWORK, str(tmp_path / "o.json"), paired=True)
        capsys.readouterr()
        compare(f"{tmp_path}/o.json,{tmp_path}/evaluation/rFD-{NETWORK}-0000000.json")
        head, *lines = capsys.readouterr().out.splitlines()
        assert head.split() == [f"FD-{NETWORK}", "psnr", "ssim"]
        one, two = (np.array(line.split()[1:], float) for line in lines)
        assert one == pytest.approx(two, rel=1e-4)


def test_ema_weights_are_measured_and_checkpoints_stay_small(images, tmp_path):
    """Wherever EMA stands; `dar validate` knows whose weights a checkpoint holds, and replaces no file."""
    before, after = ReconstructionFID(None, NETWORK), ReconstructionFID(None, f"{__name__}.Shades", label="after")
    fit = run(tmp_path, before, EMA(0.5), after, save_every=1, max_steps=4, val_check_interval=4)
    fit.fit(tokenizer_module(optimizer=OptimizerConfig(lr=0.05)), image_data(images, 3))
    names = (f"rFD-{NETWORK}", f"rFD-{__name__}.Shades-after")
    last = tmp_path / "last.ckpt"
    ema, raw = (
        numpy_distance(reconstructed(load_lightning_checkpoint(last, weights), 7, 0, "adams2"), originals(7))
        for weights in ("ema", "raw")
    )
    assert [fit.callback_metrics[f"val/{name}"].item() for name in names] == pytest.approx([ema, ema], rel=1e-4)
    assert abs(raw / ema - 1) > 0.003
    found = written(tmp_path)
    assert [one["protocol"]["samples"]["ema"] for one in found.values()] == 2 * [{"tokenizer": True}]
    kept = torch.load(last, weights_only=True)
    assert {name.split(".")[0] for name in kept["state_dict"]} == {"tokenizer"}
    assert [state for key, state in kept["callbacks"].items() if "ReconstructionFID" in key] == 2 * [{"measured_at": 0}]

    again = run(tmp_path, ReconstructionFID(None, NETWORK, every_n_steps=1000))
    for _ in range(2):
        again.validate(tokenizer_module(), image_data(images, 3), ckpt_path=last, verbose=False)
    more = {name: one for name, one in written(tmp_path).items() if name not in found}
    assert len(more) == 2
    for one in more.values():
        samples = one["protocol"]["samples"]
        assert (samples["ema"], samples["step"], samples["checkpoint"]) == ({"tokenizer": True}, None, str(last))
        assert one["metrics"][names[0]] == pytest.approx(ema, rel=1e-4)


@pytest.mark.parametrize("average", [[], [EMA(0.5, 5)]])
def test_a_checkpoint_without_an_average_says_so(images, tmp_path, average):
    """Lightning puts the average into "state_dict" once it has begun."""
    fit = run(tmp_path, *average, save_every=1, max_steps=1, limit_val_batches=0)
    fit.fit(tokenizer_module(), image_data(images, 3))
    again = run(tmp_path, ReconstructionFID(2, NETWORK))
    again.validate(tokenizer_module(), image_data(images, 3), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    (found,) = written(tmp_path).values()
    assert found["protocol"]["samples"]["ema"] == {"tokenizer": False}


def test_generation_fid_is_that_of_dar_evaluate(images, tokens, tokenizer_folder, tmp_path):
    """And so with stored statistics as a reference."""
    options = dict(num_samples=9, seed=5, guidance=(1.0, 2.0), solver="euler", num_steps=8)
    callback = GenerationFID(tokenizer_folder, images[1], features=NETWORK, batch_size=4, **options)
    fit = run(tmp_path, callback, EMA(0.5), save_every=1, max_steps=4, val_check_interval=2)
    fit.fit(ar_module(optimizer=OptimizerConfig(lr=0.1)), token_data(tokens))
    logged = fit.callback_metrics[f"val/gFD-{NETWORK}"].item()
    ar = load_lightning_checkpoint(tmp_path / "last.ckpt", "ema")
    DARPipeline(make_tokenizer(), ar, CLASSES).save_pretrained(tmp_path / "pipeline")
    files = dict(output=str(tmp_path / "o.json"), save_statistics=str(tmp_path / "statistics.npz"))
    result = evaluate(str(tmp_path / "pipeline"), images[1], NETWORK, batch_size=9, **files, **options)
    expected = result["metrics"][f"FD-{NETWORK}"]
    assert logged == pytest.approx(expected, rel=1e-3)
    compare(f"{tmp_path}/o.json,{tmp_path}/evaluation/gFD-{NETWORK}-0000004.json")
    first, last = (one["protocol"]["samples"] for one in written(tmp_path).values())
    other = result["protocol"]["samples"]
    assert last["ema"] == other["ema"] == {"tokenizer": None, "ar": True}, "saved with the weights"
    assert last["ar_sha256"] == other["ar_sha256"] != first["ar_sha256"]
    found = {name: last[name] for name in ("n", "seed", "guidance", "solver", "steps")}
    assert found == {"n": 9, "seed": 5, "guidance": [1.0, 2.0], "solver": "euler", "steps": 8}

    stored = GenerationFID(tokenizer_folder, files["save_statistics"], features=NETWORK, batch_size=4, **options)
    checkpoint = tmp_path / "last.ckpt"
    found = run(tmp_path, stored).validate(ar_module(), token_data(tokens), ckpt_path=checkpoint, verbose=False)[0]
    assert found[f"val/gFD-{NETWORK}"] == pytest.approx(logged, rel=1e-6)


@pytest.mark.parametrize(
    ("every", "parts", "steps"),
    [
        (4, [6], [4]),
        (5, [4, 6], [6]),
        # the checkpoint of step 4 was written before the validation: what it does not know of is measured again
        (4, [4, 6], [4, 6]),
    ],
)
def test_the_first_validation_at_or_after_each_multiple_is_measured(images, tmp_path, every, parts, steps):
    """Training validates at steps 2, 4 and 6, and once before."""
    checkpoint = None
    for last in parts:
        callback = ReconstructionFID(2, NETWORK, every_n_steps=every)
        options = dict(val_check_interval=2, max_steps=last, check_val_every_n_epoch=None, num_sanity_val_steps=1)
        fit = run(tmp_path, callback, save_every=2, **options)
        fit.fit(tokenizer_module(), image_data(images, 3), ckpt_path=checkpoint)
        checkpoint = tmp_path / "last.ckpt"
    assert [int(name.rpartition("-")[2]) for name in written(tmp_path)] == steps


def test_labels_tell_two_of_a_kind_apart(images, tokens, tokenizer_folder, tmp_path):
    """Images are made in the precision of the run, features in float32."""
    found = {Layer: set(), torch.nn.Linear: set()}

    def note(layer, inputs, output):
        if type(layer) in found:
            found[type(layer)].add(output.dtype)

    def two(module, data, kind, *arguments):
        callbacks = [kind(*arguments, NETWORK), kind(*arguments, NETWORK, seed=3, label="other")]
        hook = register_module_forward_hook(note)
        logged = run(tmp_path, *callbacks, precision="bf16-mixed").validate(module, data, verbose=False)[0]
        hook.remove()
        assert {kind: found[kind] for kind in found} == {Layer: {torch.float32}, torch.nn.Linear: {torch.bfloat16}}
        return logged

    logged = two(ar_module(), token_data(tokens), GenerationFID, tokenizer_folder, images[1], 4)
    logged |= two(tokenizer_module(), image_data(images, 3), ReconstructionFID, 5)
    for name in (f"gFD-{NETWORK}", f"rFD-{NETWORK}", "rPSNR", "rSSIM"):
        assert logged[f"val/{name}"] != logged[f"val/{name}-other"]
    files = written(tmp_path)
    assert set(files) == {f"{kind}FD-{NETWORK}{label}-0000000" for kind in "gr" for label in ("", "-other")}
    other = files[f"rFD-{NETWORK}-other-0000000"]["metrics"]
    assert other["rPSNR"] == pytest.approx(logged["val/rPSNR-other"]), "as without a label: dar compare knows it"


def test_a_signal_does_not_wait_for_all_images(images, tokens, tokenizer_folder, tmp_path, monkeypatch, capsys):
    draw_rows, drawn = image_sets.draw_rows, []

    def signalled(*arguments):
        drawn.append(None)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return draw_rows(*arguments)

    monkeypatch.setattr(image_sets, "draw_rows", signalled)
    callback = GenerationFID(tokenizer_folder, images[1], 40, "color_edges", batch_size=2)
    fit = run(tmp_path, callback, StopOnSignal(), save_every=1, max_steps=4, val_check_interval=2)
    with pytest.raises(SystemExit) as caught:
        fit.fit(ar_module(), token_data(tokens))
    assert (caught.value.code, len(drawn)) == (128 + signal.SIGUSR1, 3), "of 20 batches"
    assert "SIGUSR1: stopped after step 2, saved in" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_costs_a_line(images, tmp_path, capsys):
    (tmp_path / "evaluation").write_text("a file, where a folder belongs")
    fit = run(tmp_path, ReconstructionFID(None, "color_edges"), max_steps=2, val_check_interval=1)
    fit.fit(tokenizer_module(), image_data(images, 3))
    assert fit.global_step == 2
    value = fit.callback_metrics["val/rFD-color_edges"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(said) == 2
    assert said[1].startswith(f"WARNING: cannot write {tmp_path}/evaluation/rFD-color_edges-0000002.json: ")
    assert said[1].endswith(f"val/rFD-color_edges of step 2 is {float(value):.6g}; training goes on")
    refused("cannot write", lambda: fit.validate(tokenizer_module(), image_data(images, 3), verbose=False))


def test_mistakes_are_one_line(images, tokens, tokenizer_folder, tmp_path, capsys):
    def validated(module, data, message, *callbacks):
        refused(message, lambda: run(tmp_path, *callbacks).validate(module, datamodule=data, verbose=False))

    of_images, of_tokens = (tokenizer_module(), image_data(images)), (ar_module(), token_data(tokens))
    drawing = GenerationFID(tokenizer_folder, images[1], 9, NETWORK)
    validated(*of_images, "TokenizerModule has no AR model", drawing)
    validated(*of_tokens, "ARModule has no tokenizer; GenerationFID", ReconstructionFID(2, NETWORK))
    validated(*of_images, "^ReconstructionFID: features nothing: not incep", ReconstructionFID(features="nothing"))
    two = ReconstructionFID(2, NETWORK), ReconstructionFID(5, f"{__name__}.Shades")
    validated(*of_images, "two of them log val/rPSNR, give one another label", *two)
    nowhere = GenerationFID(tokenizer_folder, "nowhere", 9, NETWORK)
    validated(*of_tokens, "^GenerationFID: reference: nowhere does not exist", nowhere)
    for make, message in (
        (lambda: GenerationFID(tokenizer_folder, images[1], 1), "num_samples is 1"),
        (lambda: ReconstructionFID(every_n_steps=0), "every_n_steps is 0"),
        (lambda: ReconstructionFID(label="a/b"), "label is 'a/b'"),
    ):
        refused(message, make)
    one = ["--trainer.callbacks+=dar_lightning.training.callbacks.GenerationFID"]
    one += [f"--trainer.callbacks.tokenizer={tokenizer_folder}", f"--trainer.callbacks.reference={images[1]}"]
    found = refusal(capsys, [*fit_ar(*tokens, tmp_path, max_steps=1), *one, *one])
    assert "dar fit: trainer: Found more than one stateful callback of type `GenerationFID`" in found


def measured(images: str, tokens: str, tokenizer: str, folder: Path, world: int) -> dict:
    options = dict(devices=world, strategy="ddp" if world > 1 else "auto")
    # 7 images, of which 6 count: the last batch of rank 1 holds padding alone
    fit = run(folder, ReconstructionFID(6, "color_edges"), **options)
    values = fit.validate(tokenizer_module(), image_data((None, images), 2), verbose=False)[0]
    for rows, name in ((2, "of many"), (16, "one batch")):  # with two ranks, none for the second
        callback = GenerationFID(tokenizer, images, 9, "color_edges", batch_size=rows)
        fit = run(folder / name, callback, **options)
        logged = fit.validate(ar_module(), token_data((None, tokens), 2), verbose=False)[0]
        values[name] = logged["val/gFD-color_edges"]
    return values


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(images, tokens, tokenizer_folder, two_ranks, tmp_path):
    arguments, folders = (images[1], tokens[1], tokenizer_folder), (tmp_path / "one", tmp_path / "two")
    one, two = measured(*arguments, folders[0], 1), two_ranks(measured, *arguments, folders[1], 2)
    assert two[0] == two[1]
    for part in (".", "of many"):
        (first,), (second,) = (written(folder / part).values() for folder in folders)
        protocols = [found["protocol"] | {"provenance": None} for found in (first, second)]
        assert protocols[0] == protocols[1], "the hash of the reference's pixels, too"
    names = ["val/rFD-color_edges", "of many", "one batch", "val/rPSNR", "val/rSSIM"]
    assert {name: two[0][name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-4)


def one_broken(folder: str, tokenizer: str) -> None:
    """Reads a folder whose image number 3 is no image: it is rank 1's."""
    callback = GenerationFID(tokenizer, folder, 8, "color_edges", batch_size=1)
    callback._tokenizer = SequentialDiffusionTokenizer.from_pretrained(tokenizer)
    callback._network = FrozenNetwork(load_features("color_edges"))
    images = image_sets.open_images(folder, "GenerationFID: reference", SIZE)
    context = SimpleNamespace(val_step_context=nullcontext)
    here = SimpleNamespace(callbacks=[], global_rank=dist.get_rank(), world_size=2, precision_plugin=context)
    callback._measured(images, here, SimpleNamespace(device=torch.device("cpu")), numbered=True)


def test_an_image_that_one_rank_cannot_decode_ends_all(pair, tokenizer_folder, tmp_path):
    """The others would wait for it without end."""
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"none")
    found = pair(one_broken, str(tmp_path), tokenizer_folder)
    assert found[0] == found[1]
    assert "UserError: GenerationFID: reference" in found[0]
    assert "3.png cannot be decoded" in found[0]
