"""What the callbacks draw into TensorBoard's files, read back from them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from runs import events, image_data, scalars, tokenizer_module, trainer
from tiny_models import GROUPS, SIZE, fit_ar, fit_tokenizer, make_tokenizer, picture

from dar_lightning.cli import main
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.tokenizer.decoder import PixelDecoder
from dar_lightning.training.callbacks import Reconstructions
from dar_lightning.weights.lightning import load_lightning_checkpoint

PAD = 2  # torchvision.utils.make_grid


def run(command: list, callback: str, *more: str, **settings) -> None:
    ours = "--trainer.callbacks+=dar_lightning.training.callbacks"
    values = [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]
    average = [f"{ours}.EMA", "--trainer.callbacks.decay=0.6", "--model.init_args.optimizer.lr=0.1"]
    words = [*command, f"{ours}.LastStepCheckpoint", *average, f"{ours}.{callback}", *values, *more]
    main([str(word) for word in words])


def drawn(folder: Path, name: str) -> tuple[list[int], np.ndarray]:
    """Steps at which a picture was logged, and the last of them as tiles (rows, columns, H, W, 3)."""
    found = events(folder).Images(name)
    pixels = np.array(Image.open(io.BytesIO(found[-1].encoded_image_string)))
    cell = SIZE + PAD
    rows, columns = (pixels.shape[0] - PAD) // cell, (pixels.shape[1] - PAD) // cell
    tiles = pixels[PAD:, PAD:].reshape(rows, cell, columns, cell, 3).transpose(0, 2, 1, 3, 4)
    return [event.step for event in found], tiles[:, :, :SIZE, :SIZE]


def test_reconstructions(images, tmp_path):
    command = fit_tokenizer(*images, tmp_path, max_steps=4, val_check_interval=2)
    run(command, "Reconstructions", num_images=3, num_strips=3)
    logged = {name: values[max(values)] for name, values in scalars(tmp_path).items()}
    originals = np.stack([np.array(picture(number)) for number in range(3)])

    steps, tiles = drawn(tmp_path, "reconstructions")
    tiles = tiles.reshape(-1, 2, SIZE, SIZE, 3)[:3]  # pairs: original, reconstruction
    assert steps == [2, 4]
    assert np.array_equal(tiles[:, 0], originals)
    errors = np.square(tiles[:, 1].astype(float) - originals).mean(axis=(1, 2, 3))
    psnr = np.mean(10 * np.log10(255**2 / errors))
    assert logged["val/psnr"] == pytest.approx(psnr, abs=1e-3)

    steps, strips = drawn(tmp_path, "previews")
    assert steps == [2, 4]
    assert strips.shape == (3, 1 + GROUPS, SIZE, SIZE, 3)
    assert np.array_equal(strips[:, 0], originals)
    assert np.array_equal(strips[:, -1], tiles[:, 1]), "the last preview is the reconstruction"
    for groups in range(1, GROUPS + 1):
        errors = np.square(strips[:, groups].astype(float) - originals).mean(axis=(1, 2, 3))
        psnr = np.mean(10 * np.log10(255**2 / errors))
        assert logged[f"groups/val_psnr_after_{groups}"] == pytest.approx(psnr, abs=1e-3)

    averaged = load_lightning_checkpoint(tmp_path / "checkpoints" / "last.ckpt", "ema")
    pixels = torch.from_numpy(originals).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    again = averaged.detokenize(averaged.tokenize(pixels), noise)
    again = ((again.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(tiles[:, 1].astype(int) - again).max() <= 1


def test_samples(tokens, tokenizer_folder, tmp_path):
    command = fit_ar(*tokens, tmp_path / "run", max_steps=4, val_check_interval=2)
    settings = dict(tokenizer=tokenizer_folder, classes=[2, 0], per_class=3, guidance=1.5)
    run(command, "Samples", **settings)
    steps, tiles = drawn(tmp_path / "run", "samples")
    assert steps == [2, 4]
    assert tiles.shape == (2, 3, SIZE, SIZE, 3)

    ar = load_lightning_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    images = DARPipeline(make_tokenizer(), ar).generate(
        torch.tensor([2, 2, 2, 0, 0, 0]), guidance=1.5, generator=generators
    )
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(tiles.reshape(6, SIZE, SIZE, 3).astype(int) - pixels).max() <= 1


def test_pictures_are_drawn_in_the_precision_of_the_run(images, tokens, tokenizer_folder, tmp_path, monkeypatch):
    """And another logger than TensorBoard gets none."""
    dtypes, forward = set(), PixelDecoder.forward

    def noted(self, *inputs):
        if not torch.is_grad_enabled():
            dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return forward(self, *inputs)

    monkeypatch.setattr(PixelDecoder, "forward", noted)
    steps, more = {"max_steps": 1, "val_check_interval": 1}, ["--trainer.precision=bf16-mixed"]
    run(fit_ar(*tokens, tmp_path / "two", **steps), "Samples", *more, tokenizer=tokenizer_folder)
    assert dtypes == {torch.bfloat16}
    more += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'csv'}"]
    run(fit_tokenizer(*images, tmp_path / "csv", **steps), "Reconstructions", *more)
    assert dtypes == {torch.bfloat16}
    dtypes.clear()
    run(fit_ar(*tokens, tmp_path / "csv", **steps), "Samples", *more, tokenizer=tokenizer_folder)
    assert not dtypes
    assert not list((tmp_path / "csv").rglob("events.out.*"))


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
