"""Frechet distances in validation: against plain numpy, on EMA weights, outside of checkpoints, and on two ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from runs import ar_module, image_data, token_data, tokenizer_module, trainer
from tiny_models import CLASSES, SIZE, make_tokenizer, picture
from torchmetrics.functional.image import structural_similarity_index_measure

from dar_lightning import DARPipeline
from dar_lightning.commands.compare import compare
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.errors import UserError
from dar_lightning.records.pixels import image_digests, set_sha256
from dar_lightning.training.callbacks import EMA, GenerationFID, LastStepCheckpoint, ReconstructionFID
from dar_lightning.training.optim import OptimizerConfig
from dar_lightning.weights.lightning import load_lightning_checkpoint


class Colors(torch.nn.Module):
    """Mean and spread of each channel, (B, 6): features that numpy computes too."""

    def forward(self, images):
        pixels = images.float()
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3), correction=0)], dim=1)


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


def run(folder: Path, *callbacks, **options):
    """A Trainer whose figures go to folder/evaluation."""
    return trainer(*callbacks, default_root_dir=folder, **options)


def saving(folder: Path, every: int = 1) -> LastStepCheckpoint:
    return LastStepCheckpoint(dirpath=folder, every_n_train_steps=every, save_top_k=0)


def written(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "evaluation").iterdir())]


@pytest.mark.parametrize("num_samples", [None, 5])
def test_reconstruction_fid_is_numpys(images, tmp_path, num_samples):
    module = tokenizer_module()
    callback = ReconstructionFID(num_samples, NETWORK, seed=3, solver="euler")
    logged = run(tmp_path, callback).validate(module, image_data(images, 3), verbose=False)[0]
    count = num_samples or 7
    decoded = reconstructed(module.tokenizer, count, 3, "euler")
    assert logged[f"val/rFD-{NETWORK}"] == pytest.approx(numpy_distance(decoded, originals(count)), rel=1e-5)
    errors = ((decoded - originals(count)) ** 2).mean((1, 2, 3))
    assert logged["val/rPSNR"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), rel=1e-5)
    pair = [torch.from_numpy(array).permute(0, 3, 1, 2).float() for array in (decoded, originals(count))]
    ssim = structural_similarity_index_measure(*pair, data_range=255.0).item()
    assert logged["val/rSSIM"] == pytest.approx(ssim, abs=1e-5)
    result = json.loads((tmp_path / "evaluation" / f"rFD-{NETWORK}-0000000.json").read_text())
    figures = (f"rFD-{NETWORK}", "rPSNR", "rSSIM")
    assert result["metrics"] == {name: pytest.approx(logged[f"val/{name}"], rel=1e-6) for name in figures}
    samples, reference = result["protocol"]["samples"], result["protocol"]["reference"]
    assert (samples["n"], samples["seed"], samples["solver"], samples["steps"]) == (count, 3, "euler", 4)
    assert reference.pop("sha256") == set_sha256(image_digests(originals(count)))
    assert reference == {"shards": images[1], "crop": f"ADM centre crop to {SIZE}", "n": count}


def test_figures_of_a_callback_and_of_dar_evaluate_stand_side_by_side(images, tmp_path, capsys):
    module = tokenizer_module()
    run(tmp_path, ReconstructionFID(None, NETWORK)).validate(module, image_data(images, 3), verbose=False)
    np.savez(tmp_path / "same.npz", arr_0=reconstructed(module.tokenizer, 7, 0, "adams2").astype(np.uint8))
    evaluate(str(tmp_path / "same.npz"), images[1], NETWORK, str(tmp_path / "o.json"), paired=True)
    capsys.readouterr()
    compare(f"{tmp_path}/o.json,{tmp_path}/evaluation/rFD-{NETWORK}-0000000.json")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == [f"FD-{NETWORK}", "psnr", "ssim"]
    one, two = (np.array(line.split()[1:], float) for line in lines)
    assert one == pytest.approx(two, rel=1e-4)


def test_ema_weights_are_measured_and_checkpoints_stay_small(images, tmp_path):
    before, after = ReconstructionFID(None, NETWORK), ReconstructionFID(None, f"{__name__}.Shades", label="after")
    callbacks = [before, EMA(0.5), after, saving(tmp_path)]
    fit = run(tmp_path, *callbacks, enable_checkpointing=True, max_steps=4, val_check_interval=4)
    fit.fit(tokenizer_module(optimizer=OptimizerConfig(lr=0.05)), image_data(images, 3))
    logged = [fit.callback_metrics[f"val/{callback.name}"].item() for callback in (before, after)]
    last = tmp_path / "last.ckpt"
    of = {
        weights: numpy_distance(reconstructed(load_lightning_checkpoint(last, weights), 7, 0, "adams2"), originals(7))
        for weights in ("ema", "raw")
    }
    assert logged == pytest.approx(2 * [of["ema"]], rel=1e-4)
    assert abs(of["raw"] / of["ema"] - 1) > 0.003
    assert [found["protocol"]["samples"]["ema"] for found in written(tmp_path)] == 2 * [{"tokenizer": True}]
    kept = torch.load(last, weights_only=True)
    assert {name.split(".")[0] for name in kept["state_dict"]} == {"tokenizer"}
    assert [state for key, state in kept["callbacks"].items() if "ReconstructionFID" in key] == 2 * [{"measured_at": 0}]


@pytest.mark.parametrize(("average", "says"), [([EMA(0.5)], True), ([], False), ([EMA(0.5, 5)], False)])
def test_validating_a_checkpoint_says_whose_weights_it_holds(images, tmp_path, average, says):
    """Lightning puts the average into "state_dict", once it has begun: EMA, whether or not the callback is there."""
    fit = run(tmp_path, *average, saving(tmp_path), enable_checkpointing=True, max_steps=1, limit_val_batches=0)
    fit.fit(tokenizer_module(), image_data(images, 3))
    for _ in range(2):
        callback = ReconstructionFID(None, NETWORK, every_n_steps=1000)
        data, checkpoint = image_data(images, 3), tmp_path / "last.ckpt"
        run(tmp_path, callback).validate(tokenizer_module(), data, ckpt_path=checkpoint, verbose=False)
    found = written(tmp_path)
    assert len(found) == 2, "the second replaces nothing"
    for one in found:
        samples = one["protocol"]["samples"]
        assert samples["ema"] == {"tokenizer": says}
        assert (samples["step"], samples["checkpoint"]) == (None, str(tmp_path / "last.ckpt"))


def test_generation_fid_is_that_of_dar_evaluate(images, tokens, tokenizer_folder, tmp_path):
    options = dict(num_samples=9, seed=5, guidance=(1.0, 2.0), solver="euler", num_steps=8, batch_size=4)
    callback = GenerationFID(tokenizer_folder, images[1], features=NETWORK, **options)
    callbacks = [callback, EMA(0.5), saving(tmp_path)]
    fit = run(tmp_path, *callbacks, enable_checkpointing=True, max_steps=4, val_check_interval=2)
    fit.fit(ar_module(optimizer=OptimizerConfig(lr=0.1)), token_data(tokens))
    logged = fit.callback_metrics[f"val/gFD-{NETWORK}"].item()
    ar = load_lightning_checkpoint(tmp_path / "last.ckpt", "ema")
    DARPipeline(make_tokenizer(), ar, CLASSES).save_pretrained(tmp_path / "pipeline")
    del options["batch_size"]
    result = evaluate(str(tmp_path / "pipeline"), images[1], NETWORK, str(tmp_path / "o.json"), batch_size=9, **options)
    assert logged == pytest.approx(result["metrics"][f"FD-{NETWORK}"], rel=1e-3)
    compare(f"{tmp_path}/o.json,{tmp_path}/evaluation/gFD-{NETWORK}-0000004.json")
    first, last = written(tmp_path)
    mine, other = last["protocol"]["samples"], result["protocol"]["samples"]
    assert mine["ema"] == {"tokenizer": None, "ar": True}
    assert other["ema"] == {"tokenizer": None, "ar": True}, "saved with the weights"
    assert mine["ar_sha256"] == other["ar_sha256"] != first["protocol"]["samples"]["ar_sha256"]
    found = {name: mine[name] for name in ("n", "seed", "guidance", "solver", "steps")}
    assert found == {"n": 9, "seed": 5, "guidance": [1.0, 2.0], "solver": "euler", "steps": 8}


def test_stored_statistics_are_a_reference_too(images, tokens, tokenizer_folder, tmp_path):
    file = str(tmp_path / "statistics.npz")
    evaluate(images[0], images[1], NETWORK, str(tmp_path / "o.json"), save_statistics=file)
    values = []
    for reference in (images[1], file):
        callback = GenerationFID(tokenizer_folder, reference, 9, NETWORK)
        values.append(run(tmp_path, callback).validate(ar_module(), token_data(tokens), verbose=False)[0])
    name = f"val/gFD-{NETWORK}"
    assert values[0][name] == pytest.approx(values[1][name], rel=1e-6)


@pytest.mark.parametrize(
    ("every", "parts", "steps"),
    [
        (3, [6], [4, 6]),
        (5, [4, 6], [6]),
        # the checkpoint of step 4 was written before the validation: what it does not know of is measured again
        (4, [4, 6], [4, 6]),
        (3, [2, 4, 6], [4, 6]),
    ],
)
def test_validations_at_no_multiple_are_measured_all_the_same(images, tmp_path, every, parts, steps):
    """The first one at or after each multiple of `every`; training validates at steps 2, 4 and 6, and once before."""
    checkpoint = None
    for last in parts:
        callback = ReconstructionFID(2, NETWORK, every_n_steps=every)
        options = dict(enable_checkpointing=True, val_check_interval=2, max_steps=last, check_val_every_n_epoch=None)
        fit = run(tmp_path, callback, saving(tmp_path, 2), num_sanity_val_steps=1, **options)
        fit.fit(tokenizer_module(), image_data(images, 3), ckpt_path=checkpoint)
        checkpoint = tmp_path / "last.ckpt"
    assert [int(path.stem.rpartition("-")[2]) for path in sorted((tmp_path / "evaluation").iterdir())] == steps


def test_mistakes_are_one_line(images, tokens, tokenizer_folder, tmp_path):
    def validate(callback, module, data):
        run(tmp_path, callback).validate(module, datamodule=data, verbose=False)

    for callback, message in (
        (GenerationFID(tokenizer_folder, images[1], 9, NETWORK), "TokenizerModule has no AR model"),
        (ReconstructionFID(features="nothing"), r"^ReconstructionFID: features nothing: not inception, mobilenet_v2"),
    ):
        with pytest.raises(UserError, match=message):
            validate(callback, tokenizer_module(), image_data(images))
    for callback, message in (
        (GenerationFID(tokenizer_folder, "nowhere", 9, NETWORK), r"^GenerationFID: reference: nowhere does not exist"),
        (GenerationFID(tokenizer_folder, images[1], 1, NETWORK), "num_samples is 1"),
    ):
        with pytest.raises(UserError, match=message):
            validate(callback, ar_module(), token_data(tokens))
    with pytest.raises(UserError, match="every_n_steps is 0"):
        ReconstructionFID(every_n_steps=0)


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
        protocols = [written(folder / part)[0]["protocol"] | {"provenance": None} for folder in folders]
        assert protocols[0] == protocols[1], "the hash of the reference's pixels, too"
    names = ["val/rFD-color_edges", "of many", "one batch", "val/rPSNR", "val/rSSIM"]
    assert {name: two[0][name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-4)
