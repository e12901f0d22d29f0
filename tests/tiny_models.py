"""The smallest models that have all the parts, and data for them."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models import vgg

from dar_lightning import ARConfig, ARModel, DARPipeline, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.data.token_dataset import CodesIndex, describe, write_codes
from dar_lightning.tokenizer.config import PARTS
from dar_lightning.tokenizer.init import TokenizerInit

SIZE, TOKENS, GROUPS, CODES = 32, 8, 4, 32
CLASSES = ("red", "green", "blue", "grey")
TOKENIZER = {f"{part}_{what}": n for part in PARTS for what, n in (("dim", 32), ("depth", 1))}
TOKENIZER |= dict(image_size=SIZE, encoder_patch_size=8, decoder_patch_size=8, head_dim=16, repa_layer=None)
TOKENIZER |= dict(num_tokens=TOKENS, num_groups=GROUPS, codebook_size=CODES, codebook_dim=4)
INIT = dict(modulation_std=0.1)  # so that the first steps of training already do something
AR = dict(vocab_size=CODES, num_tokens=TOKENS, num_classes=len(CLASSES), dim=32, depth=2, num_heads=2, multiple_of=32)


def make_tokenizer(seed: int = 0, **changes) -> SequentialDiffusionTokenizer:
    """As if trained: a new one's gates are shut, and its decoder puts out zeros."""
    torch.manual_seed(seed)
    tokenizer = SequentialDiffusionTokenizer(TokenizerConfig(**TOKENIZER | changes), TokenizerInit(**INIT)).eval()
    for parameter in tokenizer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    for block in (*tokenizer.encoder.blocks, *tokenizer.conditioner.blocks):
        block.gate1.data += 1
        block.gate2.data += 1
    for block in tokenizer.decoder.blocks:
        block.modulation.bias.data.unflatten(0, (6, -1))[2::3] += 1  # of (shift, scale, gate) twice
    return tokenizer


def make_ar(seed: int = 0, **changes) -> ARModel:
    """As if trained: logits far from flat, so that sampling depends on everything that it should."""
    torch.manual_seed(seed)
    ar = ARModel(ARConfig(**AR | changes)).eval()
    for parameter in ar.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ar


def seeds(*numbers: int) -> list[torch.Generator]:
    """One generator for each sample."""
    return [torch.Generator().manual_seed(number) for number in numbers]


def make_pipeline() -> DARPipeline:
    return DARPipeline(make_tokenizer(), make_ar(), CLASSES)


def picture(number: int) -> Image.Image:
    """A picture of noise of its own, tinted by its class, number mod 4."""
    pixels = np.random.default_rng(number).integers(0, 128, (SIZE, SIZE, 3), dtype=np.uint8)
    label = number % len(CLASSES)
    pixels[..., slice(None) if label == 3 else label] += 100
    return Image.fromarray(pixels)


def write_images(folder: Path, count: int, label=lambda number: number % len(CLASSES)) -> str:
    """Image shards of pictures 0 to count - 1, the label written as it is."""

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        png = io.BytesIO()
        picture(number).save(png, "PNG")
        return f"{number:04d}", {"png": png.getvalue(), "cls": str(label(number)).encode()}

    shard = write_shard(folder / "000000.tar", [sample(number) for number in range(count)])
    ShardIndex(folder, (shard,), CLASSES).save()
    return str(folder)


def random_codes(count: int, num_tokens=TOKENS, codebook_size=CODES) -> np.ndarray:
    """(count, num_tokens) int64."""
    return np.random.default_rng(0).integers(0, codebook_size, (count, num_tokens))


def write_tokens(
    folder: Path, count: int, classes=CLASSES, num_tokens: int = TOKENS, codebook_size: int = CODES
) -> str:
    """Token shards of random_codes, classes in turn."""
    folder.mkdir(parents=True)
    classes = tuple(classes)
    path, labels = folder / "000000.safetensors", np.arange(count) % len(classes)
    codes = random_codes(count, num_tokens, codebook_size).astype(np.uint16)[:, None]
    write_codes(path, codes, labels, [f"{i:04d}" for i in range(count)], {})
    shards = (describe(path, count),)
    CodesIndex(folder, "0" * 64, {}, "center", 1, SIZE, num_tokens, codebook_size, classes, shards).save()
    return str(folder)


def options(prefix: str, values: dict) -> list[str]:
    """A dictionary as options of `dar fit`."""
    return [f"--{prefix}.{name}={value}" for name, value in values.items()]


def fit_tokenizer(train: str, val: str, folder: Path, **trainer) -> list[str]:
    """Arguments of `dar` that train the tiny tokenizer."""
    model = {"config": json.dumps(TOKENIZER), "init": json.dumps(INIT)}
    data = ["--data=dar_lightning.data.imagenet.ImageNetDataModule", f"--data.init_args.image_size={SIZE}"]
    return _fit("TokenizerModule", model, data, (train, val, folder), trainer)


def fit_ar(train: str, val: str, folder: Path, **trainer) -> list[str]:
    """Arguments of `dar` that train the tiny AR model."""
    data = ["--data=dar_lightning.data.codes.CodesDataModule"]
    return _fit("ARModule", {"config": json.dumps(AR)}, data, (train, val, folder), trainer)


def _fit(module: str, model: dict, data: list[str], paths: tuple[str, str, Path], trainer: dict) -> list[str]:
    train, val, folder = paths
    common = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    common |= {"enable_progress_bar": "false", "enable_model_summary": "false", "default_root_dir": folder}
    words = ["fit", "--seed_everything=1", f"--model=dar_lightning.training.{module}"]
    words += [*options("model.init_args", model), *data]
    words += options("data.init_args", {"train": train, "val": val, "batch_size": 4})
    return words + options("trainer", common | trainer)


def random_vgg() -> torch.nn.Sequential:
    """The convolutions of torchvision's VGG16 with random weights; its 124 million others are not made."""
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
    for parameter in features.parameters():
        if parameter.ndim == 1:
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
    return features


def write_vgg(path: Path) -> Path:
    """These as a file under torchvision's names."""
    torch.save({f"features.{name}": tensor for name, tensor in random_vgg().state_dict().items()}, path)
    return path
