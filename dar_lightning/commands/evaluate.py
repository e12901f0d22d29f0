"""`dar evaluate`: distances and accuracies of a set of images, written with the protocol that they depend on."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dar_lightning import __version__
from dar_lightning.devices import choose_device
from dar_lightning.errors import UserError
from dar_lightning.files import write_text
from dar_lightning.metrics.features import fingerprint, frechet_name, load_features
from dar_lightning.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from dar_lightning.metrics.images import DrawnImages, ImageSet, open_images, with_progress
from dar_lightning.metrics.probe import LinearProbe
from dar_lightning.metrics.reconstruction import RECONSTRUCTION_PROTOCOL, reconstruction_metrics
from dar_lightning.pipeline import PIPELINE_CONFIG


def evaluate(
    samples: str,
    reference: str,
    features: str = "inception",
    output: str = "evaluation.json",
    paired: bool = False,
    probe_train: str | None = None,
    image_size: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    guidance: float | tuple[float, float] = 1.0,
    batch_size: int = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure samples against a reference and write every figure with its protocol.

    Args:
        samples: an npz (`arr_0` uint8 (n, H, W, 3), optionally `labels`), a folder of images, a folder of WebDataset
            shards, or a pipeline folder, which then draws class-balanced samples.
        reference: an npz, a folder of images or a folder of shards.
        features: the feature network: inception (FID), or color_edges, a timm model or the import path of an nn.Module
            from uint8 (B, 3, H, W) to (B, D) (each gives FD-<name>).
        output: the JSON file to write.
        paired: samples are reconstructions of the reference, in its order: adds PSNR and SSIM.
        probe_train: labelled real images (npz or shards). A linear probe is trained on their features; its accuracy on
            the samples, and on the reference if that has labels, is added.
        image_size: give encoded images ADM's centre crop to this size; without it they are taken as they are.
        num_samples: number of images that a pipeline draws; as many as the reference has when left out.
        seed: seed of the images that a pipeline draws.
        guidance: classifier-free guidance scale of the images that a pipeline draws; [a, b] is linear over the tokens.
        batch_size: images at a time; the figures do not depend on it.
        device: auto, cpu, cuda, cuda:N or mps.

    Returns:
        What was written: {"metrics": {name: value}, "protocol": {...}}.

    Raises:
        UserError: a set is missing, empty, of the wrong format or of another image size than the reference.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    _check_output(output)
    place = choose_device(device)
    reference_set = open_images(reference, "--reference", image_size)
    train_set = open_images(probe_train, "--probe_train", image_size) if probe_train else None
    if (Path(samples) / PIPELINE_CONFIG).is_file():
        if paired:
            raise UserError(f"--paired: {samples} is a pipeline, whose samples have no originals; give reconstructions")
        sample_set: ImageSet = DrawnImages(
            samples, len(reference_set) if num_samples is None else num_samples, seed, guidance, place
        )
    else:
        sample_set = open_images(samples, "--samples", image_size)
    if paired and len(sample_set) != len(reference_set):
        raise UserError(
            f"--paired: {samples} has {len(sample_set)} images and {reference} {len(reference_set)}; "
            "each reconstruction needs its original"
        )
    if train_set is not None:
        for option, images in (("--probe_train", train_set), ("--samples", sample_set)):
            if not images.labelled:
                raise UserError(
                    f"{option} has no labels, which the linear probe needs; give shards with .cls or npz labels"
                )
    network = load_features(features).to(place)

    def measure(images: ImageSet, option: str, size: tuple[int, int] | None = None) -> Measured:
        return _measure(images, option, network, place, batch_size, keep=train_set is not None, size=size)

    real = measure(reference_set, "--reference")
    fake = measure(sample_set, "--samples", size=real.size)
    metrics = {frechet_name(features): frechet_distance(fake.statistics, real.statistics)}
    protocol: dict[str, Any] = {
        "samples": sample_set.protocol | {"n": fake.statistics.count},
        "reference": reference_set.protocol | {"n": real.statistics.count},
        "image_size": list(real.size),
        "features": {
            "name": features,
            "sha256": fingerprint(network),
            "dim": len(real.statistics.mean),
            "resize": getattr(network, "resize", "whatever the class does"),
        },
        "frechet": "float64, unbiased covariances",
    }
    if train_set is not None:
        train = measure(train_set, "--probe_train", size=real.size)
        metrics |= _probe_accuracies(train, fake, real)
        protocol["probe"] = {
            "train": train_set.protocol | {"n": train.statistics.count},
            "classifier": "logistic regression on standardised features, l2 0.01",
        }
    if paired:
        metrics |= _reconstruction(sample_set, reference_set, batch_size, place)
        protocol["reconstruction"] = RECONSTRUCTION_PROTOCOL
    protocol["versions"] = {"dar_lightning": __version__} | {
        name: version(name) for name in ("torch", "torchmetrics", "timm")
    }

    result = {"metrics": metrics, "protocol": protocol}
    write_text(output, json.dumps(result, indent=2) + "\n")
    _print_table(result, output)
    return result


class Measured(NamedTuple):
    """One set of images, reduced: statistics, image size (H, W) and, where a probe needs them, features and labels."""

    statistics: Gaussian
    size: tuple[int, int]
    features: Tensor | None
    labels: Tensor | None


@torch.no_grad()
def _measure(
    images: ImageSet,
    option: str,
    network: nn.Module,
    device: torch.device,
    batch_size: int,
    keep: bool,
    size: tuple[int, int] | None,
) -> Measured:
    if len(images) < 2:
        raise UserError(f"{option}: {len(images)} image(s); a Frechet distance needs 2 or more on each side")
    statistics, kept, all_labels = None, [], []
    for pixels, labels in with_progress(images, batch_size, option):
        size = size or tuple(pixels.shape[2:])
        if tuple(pixels.shape[2:]) != size:
            raise UserError(
                f"{option}: images of {pixels.shape[2]}x{pixels.shape[3]}, those of --reference have "
                f"{size[0]}x{size[1]}; bring them to one size"
            )
        values = network(pixels.to(device)).cpu()
        if values.shape[:-1] != pixels.shape[:1]:
            raise UserError(
                f"--features: the network must give (B, D) features, gave {tuple(values.shape)} for B = {len(pixels)}"
            )
        if statistics is None:
            statistics = FeatureStatistics(values.shape[1])
        statistics.update(values)
        if keep:
            kept.append(values)
            all_labels.append(labels)
    labelled = keep and all_labels[0] is not None
    return Measured(
        statistics.compute(), size, torch.cat(kept) if keep else None, torch.cat(all_labels) if labelled else None
    )


def _probe_accuracies(train: Measured, samples: Measured, reference: Measured) -> dict[str, float]:
    num_classes = int(train.labels.max()) + 1
    probe = LinearProbe(train.features, train.labels)
    accuracies = {}
    for name, measured in (("samples", samples), ("reference", reference)):
        if measured.labels is None:
            continue
        if not 0 <= int(measured.labels.min()) <= int(measured.labels.max()) < num_classes:
            raise UserError(f"--{name}: has labels outside the classes of --probe_train, 0 to {num_classes - 1}")
        accuracies[f"probe_accuracy_{name}"] = probe.accuracy(measured.features, measured.labels)
    return accuracies


def _reconstruction(samples: ImageSet, reference: ImageSet, batch_size: int, device: torch.device) -> dict[str, Any]:
    metrics = reconstruction_metrics().to(device)
    originals = with_progress(reference, batch_size, "PSNR, SSIM")
    for (reconstructed, _), (original, _) in zip(samples.batches(batch_size), originals, strict=True):
        metrics.update(reconstructed.to(device).float(), original.to(device).float())
    # Identical images have an infinite PSNR, which JSON cannot hold.
    return {name: value.item() if value.isfinite() else None for name, value in metrics.compute().items()}


def _check_output(output: str) -> None:
    """Before the hours of work, not after."""
    path = Path(output)
    ancestor = next(folder for folder in path.absolute().parents if folder.exists())
    if not (ancestor.is_dir() and os.access(ancestor, os.W_OK)):
        raise UserError(f"--output {output}: {ancestor} is not a folder that can be written")
    if path.is_dir():
        raise UserError(f"--output {output}: is a folder; give the name of a JSON file")


def _print_table(result: dict[str, Any], output: str) -> None:
    protocol = result["protocol"]
    width = max(map(len, result["metrics"]))
    for name, value in result["metrics"].items():
        print(f"{name:<{width}}  {'infinite' if value is None else f'{value:.4f}':>10}")
    features, (height, size_width) = protocol["features"], protocol["image_size"]
    print(
        f"{protocol['samples']['n']} samples, {protocol['reference']['n']} reference images, {height}x{size_width}, "
        f"features {features['name']} ({features['sha256'][:12]}); protocol in {output}"
    )
