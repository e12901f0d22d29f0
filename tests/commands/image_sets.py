"""Small sets of images as files, and feature networks whose distances numpy computes, too."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.linalg import sqrtm

from dar_lightning.data.shards import ShardIndex, write_shard


def pixels(n: int, seed: int, size: int = 16) -> np.ndarray:
    """(n, size, size, 3) uint8: class i mod 2, the first reddish and the second greenish."""
    images = np.random.default_rng(seed).integers(0, 80, (n, size, size, 3), dtype=np.uint8)
    images[np.arange(n), :, :, np.arange(n) % 2] += 150
    return images


def npz(path: Path, images: np.ndarray, **arrays) -> str:
    np.savez(path, arr_0=images, **arrays)
    return str(path)


def folder(path: Path, images: np.ndarray) -> str:
    path.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:05d}.png")
    return str(path)


def shards(path: Path, images: np.ndarray) -> str:
    """Ten images a shard."""
    samples = []
    for number, image in enumerate(images):
        file = path.parent / "one.png"
        Image.fromarray(image).save(file)
        samples.append((f"{number:05d}", {"png": file.read_bytes(), "cls": str(number % 2).encode()}))
    parts = [samples[start : start + 10] for start in range(0, len(samples), 10)]
    entries = [write_shard(path / f"{number:06d}.tar", part) for number, part in enumerate(parts)]
    ShardIndex(path, tuple(entries), ("red", "green")).save()
    return str(path)


class FirstPixels(torch.nn.Module):
    """The first two pixels: (B, 6)."""

    def forward(self, images):
        return images[:, :, 0, :2].float().flatten(1)


class RedGreen(torch.nn.Module):
    """Means of two channels: (B, 2)."""

    def forward(self, images):
        return images.double().mean((2, 3))[:, :2]


class Images(torch.nn.Module):
    """Not features: it returns what it is given."""

    def forward(self, images):
        return images


NETWORK = f"{__name__}.FirstPixels"


def first_pixels(images: np.ndarray) -> np.ndarray:
    return images[:, 0, :2].transpose(0, 2, 1).reshape(len(images), -1).astype(float)


def frechet(features: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> float:
    """Of features (n, D) from stored statistics, by the formula."""
    cov = np.cov(features, rowvar=False)
    return np.square(features.mean(0) - mu).sum() + np.trace(cov + sigma - 2 * sqrtm(cov @ sigma).real)
