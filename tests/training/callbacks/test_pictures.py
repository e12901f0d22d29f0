"""What the callbacks draw and write into TensorBoard's files, read back from them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from PIL import Image
from tiny_models import GROUPS, SIZE, TOKENIZER, fit_ar, fit_tokenizer, make_tokenizer, picture
from tiny_training import events, image_data, scalars, tokenizer_module, trainer

from dar_lightning.cli import main
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.training.callbacks import Reconstructions
from dar_lightning.weights.lightning import load_lightning_checkpoint

PAD = 2  # torchvision.utils.make_grid


def run(command: list, callback: str, *more: str, **settings) -> None:
    ours = "--trainer.callbacks+=dar_lightning.training.callbacks"
    values = [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]
    average = [f"{ours}.EMA", "--trainer.callbacks.decay=0.6", "--model.init_args.optimizer.lr=0.1"]
    more = [*more, "--trainer.precision=bf16-mixed"]
    words = [*command, f"{ours}.LastStepCheckpoint", *average, f"{ours}.{callback}", *values, *more]
    main([str(word) for word in words])


def drawn(folder: Path, name: str) -> np.ndarray:
    """The second of two pictures, logged at steps 2 and 4, as tiles (rows, columns, H, W, 3)."""
    found = events(folder).Images(name)
    assert [event.step for event in found] == [2, 4]
    pixels = np.array(Image.open(io.BytesIO(found[-1].encoded_image_string)))
    cell = SIZE + PAD
    rows, columns = (pixels.shape[0] - PAD) // cell, (pixels.shape[1] - PAD) // cell
    tiles = pixels[PAD:, PAD:].reshape(rows, cell, columns, cell, 3).transpose(0, 2, 1, 3, 4)
    return tiles[:, :, :SIZE, :SIZE]


def check(tiles: np.ndarray, make) -> None:
    """Drawn in the precision of the run, and no other."""
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            images = ((make().float().clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
        assert (np.abs(tiles.reshape(images.shape) - images).max() <= 1) == enabled


def test_reconstructions(images, tmp_path):
    command = fit_tokenizer(*images, tmp_path, max_steps=4, val_check_interval=2)
    run(command, "Reconstructions", num_images=3, num_strips=3)
    logged = {name: values[max(values)] for name, values in scalars(tmp_path).items()}
    originals = np.stack([np.array(picture(number)) for number in range(3)])
    pairs = drawn(tmp_path, "reconstructions").reshape(-1, 2, SIZE, SIZE, 3)[:3]  # original, reconstruction
    strips = drawn(tmp_path, "previews")
    assert strips.shape == (3, 1 + GROUPS, SIZE, SIZE, 3)
    assert np.array_equal(pairs[:, 0], originals)
    assert np.array_equal(strips[:, 0], originals)
    assert np.array_equal(strips[:, -1], pairs[:, 1]), "the last preview is the reconstruction"
    names = {f"groups/val_psnr_after_{group}": group for group in range(1, GROUPS + 1)}
    for name, group in (names | {"val/psnr": GROUPS}).items():
        errors = np.square(strips[:, group].astype(float) - originals).mean(axis=(1, 2, 3))
        assert logged[name] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-3)

    averaged = load_lightning_checkpoint(tmp_path / "checkpoints" / "last.ckpt", "ema")
    generators = [torch.Generator().manual_seed(number) for number in range(3)]
    noise = torch.stack([torch.randn(3, SIZE, SIZE, generator=generator) for generator in generators])
    pixels = torch.from_numpy(originals).permute(0, 3, 1, 2) / 127.5 - 1
    check(pairs[:, 1], lambda: averaged.detokenize(averaged.tokenize(pixels), noise))


def test_samples(tokens, tokenizer_folder, tmp_path):
    command = fit_ar(*tokens, tmp_path, max_steps=4, val_check_interval=2)
    run(command, "Samples", tokenizer=tokenizer_folder, classes=[2, 0], per_class=3, guidance=1.5)
    tiles = drawn(tmp_path, "samples")
    assert tiles.shape == (2, 3, SIZE, SIZE, 3)
    pipeline = DARPipeline(make_tokenizer(), load_lightning_checkpoint(tmp_path / "checkpoints" / "last.ckpt"))

    def again() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
        return pipeline.generate(torch.tensor([2, 2, 2, 0, 0, 0]), guidance=1.5, generator=generators)

    check(tiles, again)


def test_another_logger_gets_no_picture(tokens, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(DARPipeline, "generate", None)
    csv = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    command = fit_ar(*tokens, tmp_path, max_steps=1, val_check_interval=1)
    run(command, "Samples", *csv, tokenizer=tokenizer_folder)
    assert not list(tmp_path.rglob("events.out.*"))


class OnlyPadding(Callback):
    """The first batch as a rank sees it that has no image of its own."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            batch["valid"] = torch.zeros_like(batch["valid"])


def test_a_first_batch_of_padding(images):
    fit = trainer(OnlyPadding(), Reconstructions())
    found = fit.validate(tokenizer_module(), image_data(images), verbose=False)[0]
    assert np.isfinite(found["val/flow"])
    assert "val/psnr" in found


def test_the_config_is_text_beside_the_curves(images, tmp_path):
    """With defaults, layers and options resolved; what only reads a run leaves its config alone."""
    (tmp_path / "layer.yaml").write_text("model:\n  init_args:\n    optimizer:\n      lr: 0.0123\n")
    command = fit_tokenizer(*images, tmp_path / "run", max_steps=1, limit_val_batches=0)
    main([str(word) for word in [*command, f"--config={tmp_path / 'layer.yaml'}"]])
    (event,) = events(tmp_path / "run").Tensors("config/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert all(line.startswith("    ") for line in lines), "Markdown shows such lines as they are"
    file = tmp_path / "run" / "logs" / "config.yaml"
    before, found = file.read_text(), yaml.safe_load("\n".join(line[4:] for line in lines))
    assert found == yaml.safe_load(before)
    options = found["model"]["init_args"]
    assert (options["optimizer"]["lr"], options["freeze_encoder"]) == (0.0123, False)
    assert options["config"].items() >= TOKENIZER.items()
    main([str(word) for word in ["validate", *command[1:], "--ckpt_path=null", "--trainer.limit_val_batches=1"]])
    assert file.read_text() == before
