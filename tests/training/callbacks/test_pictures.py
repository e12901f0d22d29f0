"""What the callbacks draw into TensorBoard's files, read back from them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import GROUPS, SIZE, TOKENIZER, fit_ar, fit_tokenizer, make_tokenizer, picture

from dar_lightning.cli import main
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.decoder import PixelDecoder
from dar_lightning.training import TokenizerModule
from dar_lightning.training.callbacks import Reconstructions
from dar_lightning.weights.lightning import load_lightning_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers
PAD = 2  # torchvision.utils.make_grid


EMA = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.6", "--model.init_args.optimizer.lr=0.1"]


def run(command: list, callback: str, **settings) -> None:
    name, checkpoint = "dar_lightning.training.callbacks", "--trainer.callbacks+=ModelCheckpoint"
    values = [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]
    words = [*command, checkpoint, "--trainer.callbacks.save_last=true", f"--trainer.callbacks+={name}.{callback}"]
    main([str(word) for word in [*words, *values]])


def drawn(folder: Path, name: str) -> tuple[list[int], np.ndarray]:
    """Steps at which a picture was logged, and the last of them as tiles (rows, columns, H, W, 3)."""
    events = EventAccumulator(str(folder / "logs")).Reload()
    found = events.Images(name)
    pixels = np.array(Image.open(io.BytesIO(found[-1].encoded_image_string)))
    cell = SIZE + PAD
    rows, columns = (pixels.shape[0] - PAD) // cell, (pixels.shape[1] - PAD) // cell
    tiles = pixels[PAD:, PAD:].reshape(rows, cell, columns, cell, 3).transpose(0, 2, 1, 3, 4)
    return [event.step for event in found], tiles[:, :, :SIZE, :SIZE]


def scalar(folder: Path, name: str) -> float:
    return EventAccumulator(str(folder / "logs")).Reload().Scalars(name)[-1].value


def test_reconstructions(images, tmp_path):
    settings = dict(max_steps=4, val_check_interval=2)
    command = fit_tokenizer(*images, tmp_path, **settings)
    run([*command, *EMA, "--trainer.callbacks.use_buffers=false"], "Reconstructions", num_images=3, num_strips=3)
    originals = np.stack([np.array(picture(number)) for number in range(3)])

    steps, tiles = drawn(tmp_path, "reconstructions")
    tiles = tiles.reshape(-1, 2, SIZE, SIZE, 3)[:3]  # pairs: original, reconstruction
    assert steps == [2, 4]
    assert np.array_equal(tiles[:, 0], originals)
    errors = np.square(tiles[:, 1].astype(float) - originals).mean(axis=(1, 2, 3))
    psnr = np.mean(10 * np.log10(255**2 / errors))
    assert scalar(tmp_path, "val/psnr") == pytest.approx(psnr, abs=1e-3)

    steps, strips = drawn(tmp_path, "previews")
    assert steps == [2, 4]
    assert strips.shape == (3, 1 + GROUPS, SIZE, SIZE, 3)
    assert np.array_equal(strips[:, 0], originals)
    assert np.array_equal(strips[:, -1], tiles[:, 1]), "the last preview is the reconstruction"
    for groups in range(1, GROUPS + 1):
        errors = np.square(strips[:, groups].astype(float) - originals).mean(axis=(1, 2, 3))
        psnr = np.mean(10 * np.log10(255**2 / errors))
        assert scalar(tmp_path, f"groups/val_psnr_after_{groups}") == pytest.approx(psnr, abs=1e-3)

    averaged = load_lightning_checkpoint(tmp_path / "checkpoints" / "last.ckpt", "ema")
    pixels = torch.from_numpy(originals).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    again = averaged.detokenize(averaged.tokenize(pixels), noise)
    again = ((again.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(tiles[:, 1].astype(int) - again).max() <= 1


def test_samples(tokens, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    command = fit_ar(*tokens, tmp_path / "run", max_steps=4, val_check_interval=2)
    settings = dict(tokenizer=tmp_path / "tokenizer", classes=[2, 0], per_class=3, guidance=1.5)
    run([*command, *EMA], "Samples", **settings)
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


def test_pictures_are_drawn_in_the_precision_of_the_run(images, tokens, tmp_path, monkeypatch):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    dtypes, steps = set(), {"max_steps": 2, "val_check_interval": 2}
    forward = PixelDecoder.forward

    def noted(self, *inputs):
        if not torch.is_grad_enabled():
            dtypes.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return forward(self, *inputs)

    for command, callback, settings in (
        (fit_tokenizer(*images, tmp_path / "one", **steps), "Reconstructions", {}),
        (
            fit_ar(*tokens, tmp_path / "two", **steps),
            "Samples",
            {"tokenizer": tmp_path / "tokenizer"},
        ),
    ):
        with monkeypatch.context() as patches:
            patches.setattr(PixelDecoder, "forward", noted)
            run([*command, "--trainer.precision=bf16-mixed"], callback, **settings)
        assert dtypes == {torch.bfloat16}, callback
        dtypes.clear()


@pytest.mark.parametrize("logger", ["CSVLogger", "false"])
def test_other_loggers_get_no_pictures(images, tokens, tmp_path, logger):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    logger = [f"--trainer.logger={logger}"]
    if logger != ["--trainer.logger=false"]:
        logger.append(f"--trainer.logger.save_dir={tmp_path}")
    for command, callback, settings in (
        (fit_tokenizer(*images, tmp_path / "one", max_steps=1), "Reconstructions", {}),
        (fit_ar(*tokens, tmp_path / "two", max_steps=1), "Samples", {"tokenizer": tmp_path / "tokenizer"}),
    ):
        run([*command, *logger], callback, **settings)
    assert not list(tmp_path.rglob("events.out.*"))


class OnlyPadding(Callback):
    """The first batch as a rank sees it that has no image of its own."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            batch["valid"] = torch.zeros_like(batch["valid"])


def test_a_first_batch_of_padding(images):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", callbacks=[OnlyPadding(), Reconstructions()], **quiet)
    data = ImageNetDataModule(*images, image_size=SIZE, batch_size=4)
    found = trainer.validate(TokenizerModule(TokenizerConfig(**TOKENIZER)), datamodule=data, verbose=False)[0]
    assert np.isfinite(found["val/flow"])
    assert "val/psnr" in found
