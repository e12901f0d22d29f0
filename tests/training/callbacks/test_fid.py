"""Frechet distances in validation: against plain numpy, on EMA weights, outside of checkpoints, and on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_models import AR, CLASSES, SIZE, make_tokenizer, picture
from torchmetrics.functional.image import structural_similarity_index_measure

from dar_lightning import DARPipeline
from dar_lightning.commands.compare import compare
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.errors import UserError
from dar_lightning.records.pixels import image_digests, set_sha256
from dar_lightning.training import ARModule, TokenizerModule
from dar_lightning.training.callbacks import GenerationFID, LastStepCheckpoint, ReconstructionFID
from dar_lightning.training.optim import OptimizerConfig
from dar_lightning.weights.lightning import load_lightning_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of loggers and workers


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


def make_trainer(folder: Path, **options) -> Trainer:
    common = dict(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    options = dict(enable_checkpointing=False, num_sanity_val_steps=0) | options
    return Trainer(default_root_dir=folder, **common | options)


def image_data(images) -> ImageNetDataModule:
    return ImageNetDataModule(*images, image_size=SIZE, batch_size=3)


@pytest.mark.parametrize("num_samples", [None, 5])
def test_reconstruction_fid_is_numpys(images, tmp_path, num_samples):
    module = TokenizerModule(make_tokenizer().config)
    module.tokenizer.load_state_dict(make_tokenizer().state_dict())
    callback = ReconstructionFID(num_samples, NETWORK, seed=3, solver="euler")
    trainer = make_trainer(tmp_path, callbacks=[callback])
    logged = trainer.validate(module, datamodule=image_data(images), verbose=False)[0]
    count = num_samples or 7
    decoded = reconstructed(module.tokenizer, count, 3, "euler")
    assert logged[f"val/rFD-{NETWORK}"] == pytest.approx(numpy_distance(decoded, originals(count)), rel=1e-5)
    errors = ((decoded - originals(count)) ** 2).mean((1, 2, 3))
    assert logged["val/rPSNR"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), rel=1e-5)
    pair = [torch.from_numpy(array).permute(0, 3, 1, 2).float() for array in (decoded, originals(count))]
    ssim = structural_similarity_index_measure(*pair, data_range=255.0).item()
    assert logged["val/rSSIM"] == pytest.approx(ssim, abs=1e-5)
    (written,) = (tmp_path / "evaluation").iterdir()
    result = json.loads(written.read_text())
    assert written.name == f"rFD-{NETWORK}-0000000.json"
    figures = (f"rFD-{NETWORK}", "rPSNR", "rSSIM")
    assert result["metrics"] == {name: pytest.approx(logged[f"val/{name}"], rel=1e-6) for name in figures}
    samples, reference = result["protocol"]["samples"], result["protocol"]["reference"]
    assert (samples["n"], samples["seed"], samples["solver"], samples["steps"]) == (count, 3, "euler", 4)
    assert reference.pop("sha256") == set_sha256(image_digests(originals(count)))
    assert reference == {"shards": images[1], "crop": f"ADM centre crop to {SIZE}", "n": count}


def test_figures_of_a_callback_and_of_dar_evaluate_stand_side_by_side(images, tmp_path, capsys):
    module = TokenizerModule(make_tokenizer().config)
    callback = ReconstructionFID(None, NETWORK)
    make_trainer(tmp_path, callbacks=[callback]).validate(module, datamodule=image_data(images), verbose=False)
    np.savez(tmp_path / "same.npz", arr_0=reconstructed(module.tokenizer, 7, 0, "adams2").astype(np.uint8))
    evaluate(str(tmp_path / "same.npz"), images[1], NETWORK, str(tmp_path / "o.json"), paired=True)
    capsys.readouterr()
    compare(f"{tmp_path}/o.json,{tmp_path}/evaluation/rFD-{NETWORK}-0000000.json")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == [f"FD-{NETWORK}", "psnr", "ssim"]
    one, two = (np.array(line.split()[1:], float) for line in lines)
    assert one == pytest.approx(two, rel=1e-4)


def test_ema_weights_are_measured_and_checkpoints_stay_small(images, tmp_path):
    ema, before, after = (
        EMAWeightAveraging(decay=0.5, use_buffers=False),
        ReconstructionFID(None, NETWORK),
        ReconstructionFID(None, f"{__name__}.Shades", label="after"),
    )
    checkpoint = LastStepCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=0)
    ordered = [before, ema, after]
    trainer = make_trainer(
        tmp_path, callbacks=[*ordered, checkpoint], enable_checkpointing=True, max_steps=4, val_check_interval=4
    )
    torch.manual_seed(0)
    module = TokenizerModule(make_tokenizer().config, OptimizerConfig(lr=0.05))
    trainer.fit(module, datamodule=image_data(images))
    logged = [trainer.callback_metrics[f"val/{callback.name}"].item() for callback in (before, after)]
    last = tmp_path / "last.ckpt"
    of = {
        weights: numpy_distance(reconstructed(load_lightning_checkpoint(last, weights), 7, 0, "adams2"), originals(7))
        for weights in ("ema", "raw")
    }
    assert logged == pytest.approx(2 * [of["ema"]], rel=1e-4)
    assert abs(of["raw"] / of["ema"] - 1) > 0.003
    written = list((tmp_path / "evaluation").iterdir())
    notes = [json.loads(path.read_text())["protocol"]["samples"]["ema"] for path in written]
    assert notes == 2 * [{"tokenizer": True}]

    kept = torch.load(last, weights_only=True)
    assert {name.split(".")[0] for name in kept["state_dict"]} == {"tokenizer"}
    assert [state for key, state in kept["callbacks"].items() if "ReconstructionFID" in key] == 2 * [{"measured_at": 0}]


@pytest.mark.parametrize("ema", [True, False])
def test_validating_a_checkpoint_says_whose_weights_it_holds(images, tmp_path, ema):
    """Lightning puts the average into "state_dict": EMA, whether or not the callback is there again."""
    averaging = [EMAWeightAveraging(decay=0.5, use_buffers=False)] if ema else []
    checkpoint = LastStepCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=0)
    fit = make_trainer(tmp_path, callbacks=[*averaging, checkpoint], enable_checkpointing=True, max_steps=1)
    fit.fit(TokenizerModule(make_tokenizer().config), datamodule=image_data(images))
    for _ in range(2):
        callback = ReconstructionFID(None, NETWORK, every_n_steps=1000)
        trainer = make_trainer(tmp_path, callbacks=[callback])
        module = TokenizerModule(make_tokenizer().config)
        trainer.validate(module, image_data(images), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    found = sorted((tmp_path / "evaluation").iterdir())
    assert len(found) == 2, "the second replaces nothing"
    for path in found:
        samples = json.loads(path.read_text())["protocol"]["samples"]
        assert samples["ema"] == {"tokenizer": ema}
        assert (samples["step"], samples["checkpoint"]) == (None, str(tmp_path / "last.ckpt"))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_generation_fid_is_that_of_dar_evaluate(images, tokens, tokenizer_folder, tmp_path):
    options = dict(num_samples=9, seed=5, guidance=(1.0, 2.0), solver="euler", num_steps=8, batch_size=4)
    callback = GenerationFID(tokenizer_folder, images[1], features=NETWORK, **options)
    checkpoint = LastStepCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=0)
    ema = EMAWeightAveraging(decay=0.5, use_buffers=False)
    trainer = make_trainer(
        tmp_path, callbacks=[callback, ema, checkpoint], enable_checkpointing=True, max_steps=4, val_check_interval=2
    )
    torch.manual_seed(0)
    trainer.fit(ARModule(ARModule(AR).ar.config, OptimizerConfig(lr=0.1)), datamodule=CodesDataModule(*tokens, 4))
    logged = trainer.callback_metrics[f"val/gFD-{NETWORK}"].item()
    ar = load_lightning_checkpoint(tmp_path / "last.ckpt", "ema")
    DARPipeline(make_tokenizer(), ar, CLASSES).save_pretrained(tmp_path / "pipeline")
    del options["batch_size"]
    result = evaluate(str(tmp_path / "pipeline"), images[1], NETWORK, str(tmp_path / "o.json"), batch_size=9, **options)
    assert logged == pytest.approx(result["metrics"][f"FD-{NETWORK}"], rel=1e-3)
    compare(f"{tmp_path}/o.json,{tmp_path}/evaluation/gFD-{NETWORK}-0000004.json")
    first, last = sorted((tmp_path / "evaluation").iterdir())
    first, last = json.loads(first.read_text()), json.loads(last.read_text())
    mine, other = last["protocol"]["samples"], result["protocol"]["samples"]
    assert mine["ema"] == {"tokenizer": None, "ar": True}
    assert other["ema"] == {"tokenizer": None, "ar": True}, "saved with the weights"
    assert mine["ar_sha256"] == other["ar_sha256"] != first["protocol"]["samples"]["ar_sha256"]
    assert {name: mine[name] for name in ("n", "seed", "guidance", "solver", "steps")} == {
        "n": 9,
        "seed": 5,
        "guidance": [1.0, 2.0],
        "solver": "euler",
        "steps": 8,
    }


def test_stored_statistics_are_a_reference_too(images, tokens, tokenizer_folder, tmp_path):
    file = str(tmp_path / "statistics.npz")
    evaluate(images[0], images[1], NETWORK, str(tmp_path / "o.json"), save_statistics=file)
    values = []
    for reference in (images[1], file):
        callback = GenerationFID(tokenizer_folder, reference, 9, NETWORK)
        trainer = make_trainer(tmp_path, callbacks=[callback])
        torch.manual_seed(0)
        module = ARModule(ARModule(AR).ar.config)
        values.append(trainer.validate(module, datamodule=CodesDataModule(*tokens, 4), verbose=False)[0])
    name = f"val/gFD-{NETWORK}"
    assert values[0][name] == pytest.approx(values[1][name], rel=1e-6)


def test_at_multiples_of_steps_and_not_in_the_sanity_check(images, tmp_path):
    callback = ReconstructionFID(None, NETWORK, every_n_steps=2)
    trainer = make_trainer(tmp_path, callbacks=[callback], max_steps=3, val_check_interval=1, num_sanity_val_steps=2)
    trainer.fit(TokenizerModule(make_tokenizer().config), datamodule=image_data(images))
    steps = sorted(path.stem.rpartition("-")[2] for path in (tmp_path / "evaluation").iterdir())
    assert steps == ["0000002"]


@pytest.mark.parametrize(
    ("every", "parts", "steps"),
    [
        (3, [6], [4, 6]),
        (4, [6], [4]),
        (5, [4, 6], [6]),
        # the checkpoint of step 4 was written before the validation: what it does not know of is measured again
        (4, [4, 6], [4, 6]),
        (3, [2, 4, 6], [4, 6]),
    ],
)
def test_validations_at_no_multiple_are_measured_all_the_same(images, tmp_path, every, parts, steps):
    """The first one at or after each multiple of `every`; training validates at steps 2, 4 and 6."""
    checkpoint = None
    for last in parts:
        callback = ReconstructionFID(2, NETWORK, every_n_steps=every)
        saver = LastStepCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=0)
        options = dict(enable_checkpointing=True, val_check_interval=2, max_steps=last, check_val_every_n_epoch=None)
        trainer = make_trainer(tmp_path, callbacks=[callback, saver], **options)
        trainer.fit(TokenizerModule(make_tokenizer().config), image_data(images), ckpt_path=checkpoint)
        checkpoint = tmp_path / "last.ckpt"
    assert [int(path.stem.rpartition("-")[2]) for path in sorted((tmp_path / "evaluation").iterdir())] == steps


def test_mistakes_are_one_line(images, tokens, tokenizer_folder, tmp_path):
    def validate(callback, module, data):
        make_trainer(tmp_path, callbacks=[callback]).validate(module, datamodule=data, verbose=False)

    tokenizer, ar = TokenizerModule(make_tokenizer().config), ARModule(ARModule(AR).ar.config)
    codes = CodesDataModule(*tokens, 4)
    with pytest.raises(UserError, match="TokenizerModule has no AR model"):
        validate(GenerationFID(tokenizer_folder, images[1], 9, NETWORK), tokenizer, image_data(images))
    with pytest.raises(UserError, match=r"^ReconstructionFID: features nothing: not inception, mobilenet_v2"):
        validate(ReconstructionFID(features="nothing"), tokenizer, image_data(images))
    with pytest.raises(UserError, match=r"^GenerationFID: reference: nowhere does not exist"):
        validate(GenerationFID(tokenizer_folder, "nowhere", 9, NETWORK), ar, codes)
    with pytest.raises(UserError, match="num_samples is 1"):
        validate(GenerationFID(tokenizer_folder, images[1], 1, NETWORK), ar, codes)
    with pytest.raises(UserError, match="every_n_steps is 0"):
        ReconstructionFID(every_n_steps=0)


SCRIPT = """
import json, sys
import torch
from lightning.pytorch import Trainer
from tiny_models import AR, SIZE, make_ar, make_tokenizer
from dar_lightning.training.callbacks import GenerationFID, ReconstructionFID
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.training import ARModule, TokenizerModule

images, tokens, tokenizer, out, world = *sys.argv[1:5], int(sys.argv[5])
options = dict(accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", logger=False)
options |= dict(enable_progress_bar=False, enable_checkpointing=False, default_root_dir=out)

module = TokenizerModule(make_tokenizer().config)
module.tokenizer.load_state_dict(make_tokenizer().state_dict())
trainer = Trainer(callbacks=[ReconstructionFID(6, "color_edges")], **options)
# 7 images, of which 6 count: the last batch of rank 1 holds padding alone
values = trainer.validate(module, datamodule=ImageNetDataModule(val=images, image_size=SIZE, batch_size=2))[0]

module = ARModule(make_ar().config)
module.ar.load_state_dict(make_ar().state_dict())
trainer = Trainer(callbacks=[GenerationFID(tokenizer, images, 9, "color_edges", batch_size=2)], **options)
values |= trainer.validate(module, datamodule=CodesDataModule(val=tokens, batch_size=2))[0]

options["default_root_dir"] = f"{out}-b"  # one batch: with two ranks, none for the second
trainer = Trainer(callbacks=[GenerationFID(tokenizer, images, 9, "color_edges", batch_size=16)], **options)
logged = trainer.validate(module, datamodule=CodesDataModule(val=tokens, batch_size=2))[0]
values["one batch"] = logged["val/gFD-color_edges"]
with open(f"{out}.{trainer.global_rank}.json", "w") as file:
    json.dump(values, file)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(images, tokens, tokenizer_folder, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)

    def run(world: int) -> list[dict]:
        command = [sys.executable, tmp_path / "run.py", images[1], tokens[1], tokenizer_folder, tmp_path / f"of{world}"]
        paths = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[3]}:{Path(__file__).parents[2]}"}
        subprocess.run([*map(str, command), str(world)], check=True, timeout=300, env=paths)
        return [json.loads((tmp_path / f"of{world}.{rank}.json").read_text()) for rank in range(world)]

    (one,), two = run(1), run(2)
    assert two[0] == two[1]
    assert two[0].pop("one batch") == pytest.approx(one.pop("one batch"), rel=1e-4)
    for name in ("rFD-color_edges-0000000.json", "gFD-color_edges-0000000.json"):
        files = [json.loads((tmp_path / f"of{world}" / "evaluation" / name).read_text()) for world in (1, 2)]
        one_protocol, other = (file["protocol"] | {"provenance": None} for file in files)
        assert one_protocol == other, "the hash of the reference's pixels, too"
    names = ["val/rFD-color_edges", "val/gFD-color_edges", "val/rPSNR", "val/rSSIM"]
    assert {name: two[0][name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-4)
