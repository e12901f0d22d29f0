"""`dar evaluate`: FID, KID, precision, recall and linear probe of a set of images, written with their protocol."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from dar_lightning.ar.guidance import Guidance, read_guidance
from dar_lightning.data.classes import labels_by_name
from dar_lightning.devices import choose_device
from dar_lightning.errors import MOST_PIXELS, UserError, begin_work, check_range
from dar_lightning.files import read_json
from dar_lightning.formats.pretrained import SHIPPED_NAMES, resolve_folder
from dar_lightning.generation.pipeline import EXPORTED, PIPELINE_CONFIG, DARPipeline
from dar_lightning.metrics.clip import CLIP, captions_sha256, check_captions, clip_score
from dar_lightning.metrics.distribution import distribution_metrics
from dar_lightning.metrics.features import feature_protocol, frechet_name, load_features
from dar_lightning.metrics.frechet import check_fits, frechet_distance, read_statistics, write_statistics
from dar_lightning.metrics.images import DrawnImages, ImageSet, NpzImages, open_images, with_progress
from dar_lightning.metrics.lpips import lpips_network
from dar_lightning.metrics.measure import Measured, measure
from dar_lightning.metrics.probe import CLASSIFIER, LinearProbe
from dar_lightning.metrics.reconstruction import mean_scores, reconstruction_protocol, reconstruction_scores
from dar_lightning.records.drawn import drawn_facts
from dar_lightning.records.protocol import FRECHET, Protocol, write_metrics
from dar_lightning.records.provenance import provenance
from dar_lightning.tokenizer.flow import check_diffusion


def evaluate(
    samples: str,
    reference: str,
    features: str = "inception",
    output: str = "evaluation.json",
    features_weights: str | None = None,
    paired: bool = False,
    lpips: str | None = None,
    full: bool = False,
    probe_train: str | None = None,
    clip: str | None = None,
    image_size: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    guidance: Guidance = 1.0,
    solver: str = "adams2",
    num_steps: int | None = None,
    save_statistics: str | None = None,
    allow_duplicates: bool = False,
    batch_size: int = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure samples against a reference and write every metric with its protocol.

    Args:
        samples: an npz (`arr_0` uint8 (n, H, W, 3), optionally `labels`), a folder of images, a folder of WebDataset
            shards, or a pipeline folder, which then draws class-balanced samples. How an npz was drawn is read from the
            JSON that `dar predict` and `dar sample` write beside it.
        reference: an npz, a folder of images or a folder of shards; or an npz of statistics (`mu`, `sigma`), such as
            ADM's reference batches, whose statistics are used as they are.
        features: the feature network: inception (FID), or mobilenet_v2, color_edges, a timm model or the import path of
            an nn.Module from uint8 (B, 3, H, W) to (B, D) (each gives FD-<name>).
        output: the JSON file to write.
        features_weights: a local file of the network's weights; left out, they are downloaded.
        paired: samples are reconstructions of the reference, in its order: adds PSNR and SSIM.
        lpips: with paired, adds LPIPS: a file of torchvision's VGG16 (data/convert_vgg16.py), or "download".
        full: adds KID, precision and recall, and for inception the Inception Score. Needs torch-fidelity.
        probe_train: labelled real images (npz or shards). A linear probe is trained on their features; its accuracy on
            the samples, and on the reference if that has labels, is added. Classes are matched by name; by number where
            a set has no names, which the protocol says.
        clip: adds the CLIP score of samples that have captions (samples.npz of `dar sample --prompt`, shards), and of
            the reference if it has some: a folder or Hugging Face repository of a CLIP of transformers, safetensors
            only. Needs transformers: pip install 'dar-lightning[text]'.
        image_size: give encoded images ADM's centre crop to this size; without it they are taken as they are.
        num_samples: number of images that a pipeline draws; as many as the reference has when left out. Of other
            samples, the number that there must be.
        seed: seed of the images that a pipeline draws.
        guidance: classifier-free guidance scale of the images that a pipeline draws; "a,b" is linear over the tokens;
            other schedules as for `dar sample`.
        solver: adams2, euler or adams2_variable, for a pipeline.
        num_steps: diffusion steps of a pipeline; left out, one per group of tokens.
        save_statistics: write the reference's statistics to this npz file, which is then a reference too.
        allow_duplicates: take samples that have an image twice.
        batch_size: images at a time, but for those that a pipeline draws; metrics depend on it no more than the
            network's features do, by rounding.
        device: auto, cpu, cuda, cuda:N or mps.

    Returns:
        What was written: {"metrics": {name: value}, "protocol": {...}}.

    Raises:
        UserError: a set is missing, empty, of the wrong format, number, range or size, or has an image twice.
    """
    check_diffusion(solver, num_steps)
    check_range(1, batch_size=batch_size)
    check_range(1, MOST_PIXELS, image_size=image_size)
    guidance = read_guidance(guidance)
    for option, path in (("--output", output), ("--save_statistics", save_statistics)):
        if path is not None:
            _check_output(option, path, {"--samples": samples, "--reference": reference})
    if lpips is not None and not paired:
        raise UserError(f"--lpips {lpips}: compares pairs; add --paired")
    place = choose_device(device)
    made = provenance(place, "float32")

    stored = read_statistics(reference, "--reference")
    reference_set = train_set = None
    if stored is None or stored.has_images:
        reference_set = open_images(reference, "--reference", image_size)
    for option, wanted in (("--paired", paired), ("--full", full), ("--probe_train", probe_train)):
        if wanted and reference_set is None:
            raise UserError(f"{option}: --reference {reference} has statistics only; give its images")
    folder = resolve_folder(samples) if samples in SHIPPED_NAMES else Path(samples)
    is_pipeline = (folder / PIPELINE_CONFIG).is_file()
    if is_pipeline:
        if paired:
            raise UserError(f"--paired: {samples} is a pipeline, whose samples have no originals; give reconstructions")
        if clip is not None:
            raise UserError(f"--clip: {samples} is a pipeline, drawn without prompts; give dar sample --prompt's npz")
        if num_samples is None and stored is not None:
            raise UserError(f"--num_samples: say how many images {samples} draws; the statistics do not")
        pipeline = DARPipeline.from_pretrained(folder).to(place)
        count = len(reference_set) if num_samples is None else num_samples
        sample_set: ImageSet = DrawnImages(pipeline, count, seed, num_steps, guidance=guidance, solver=solver)
    else:
        sample_set = open_images(samples, "--samples", image_size)
        if num_samples not in (None, len(sample_set)):
            raise UserError(f"--num_samples {num_samples}: {samples} has {len(sample_set)} images")
    if paired and len(sample_set) != len(reference_set):
        counts = f"{samples} has {len(sample_set)} images and {reference} {len(reference_set)}"
        raise UserError(f"--paired: {counts}; each reconstruction needs its original")
    if probe_train:
        train_set = open_images(probe_train, "--probe_train", image_size)
        for option, images in (("--probe_train", train_set), ("--samples", sample_set)):
            if not images.labelled:
                needed = "which the linear probe needs; give shards with .cls or npz labels"
                raise UserError(f"{option} has no labels, {needed}")
    network = load_features(features, features_weights).to(place)
    methods = {"features": feature_protocol(features, network)}
    vgg = None if lpips is None else lpips_network(lpips)
    if clip is not None:
        check_captions(sample_set, "--samples")
    scorer = None if clip is None else CLIP(clip, "--clip")

    keep = full or train_set is not None
    reduced = partial(measure, network=network, device=place, batch_size=batch_size, keep=keep)
    sha256 = methods["features"]["sha256"]
    use_stored = stored is not None and check_fits(stored, reference, features, sha256, "--reference")
    begin_work()
    real = None
    if not use_stored or keep or paired:  # whatever compares with images says which
        real = reduced(reference_set, "--reference")
    size = real.size if real else reference_set.size if isinstance(reference_set, NpzImages) else None
    fake = reduced(sample_set, "--samples", size=size, unique=not (allow_duplicates or paired))
    if is_pipeline:
        noted = read_json(folder / EXPORTED) if (folder / EXPORTED).is_file() else {}
        sample_facts = {"pipeline": samples} | {name: noted[name] for name in ("checkpoint",) if name in noted}
    else:
        sample_facts = drawn_facts(Path(samples), "--samples", fake.sha256)
    sample_facts |= sample_set.protocol | {"n": fake.statistics.count, "sha256": fake.sha256}
    gaussian = stored.statistics if use_stored else real.statistics
    reference_facts = {"npz": reference} if reference_set is None else dict(reference_set.protocol)
    reference_facts |= stored.facts() if use_stored else {"n": gaussian.count}
    if real is not None:
        reference_facts["sha256"] = real.sha256

    metrics: dict[str, float | None] = {frechet_name(features): frechet_distance(fake.statistics, gaussian)}
    methods["features"]["dim"] = len(gaussian.mean)
    methods["frechet"] = FRECHET
    if full:
        found, facts = distribution_metrics(fake.features, real.features, features, network, place)
        metrics |= found
        methods |= facts
    if train_set is not None:
        train = reduced(train_set, "--probe_train", size=fake.size)
        sets = {"samples": (sample_set, fake), "reference": (reference_set, real)}
        found, matched = _probe_accuracies(train, train_set.classes, sets)
        metrics |= found
        train_facts = train_set.protocol | {"n": train.statistics.count, "sha256": train.sha256}
        methods["probe"] = {"train": train_facts, "classifier": CLASSIFIER, "classes_matched_by": matched}
    if paired:
        two = zip(sample_set.batches(batch_size), with_progress(reference_set, batch_size, "pairs"), strict=True)
        pairs = ((one.to(place), other.to(place)) for (one, _), (other, _) in two)
        metrics |= mean_scores([reconstruction_scores(*pair, vgg) for pair in pairs])
        methods["reconstruction"] = reconstruction_protocol(vgg)
    if scorer is not None:
        sets = {"samples": sample_set}
        sets |= {"reference": reference_set} if reference_set and all(reference_set.captions) else {}
        scores = {name: clip_score(each, f"--{name}", scorer, place, batch_size) for name, each in sets.items()}
        metrics |= {f"clip_score_{name}": score for name, score in scores.items()}
        told = {name: captions_sha256(each.captions) for name, each in sets.items()}
        methods |= {"clip": scorer.facts, "clip_captions_sha256": told}
    if save_statistics is not None:
        facts = {"features_sha256": methods["features"]["sha256"], "image_size": list(fake.size)}
        write_statistics(save_statistics, gaussian, reference_facts | facts)
    protocol = Protocol(sample_facts, reference_facts, list(fake.size), methods, made)
    result = write_metrics(output, metrics, protocol)

    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {'infinite' if value is None else f'{value:.4f}':>10}")
    real_count = "stored statistics" if use_stored else f"{gaussian.count} reference images"
    network_name = f"features {features} ({methods['features']['sha256'][:12]})"
    dimensions = "x".join(map(str, fake.size))
    print(f"{len(sample_set)} samples, {real_count}, {dimensions}, {network_name}; protocol in {output}")
    return result


def _probe_accuracies(
    train: Measured, names: tuple[str, ...], sets: dict[str, tuple[ImageSet, Measured]]
) -> tuple[dict[str, float], dict[str, str]]:
    """Accuracies of the probe on sets of images, and whether their classes are its own by name or by number."""
    labels, accuracies, matched = {}, {}, {}
    for name, (images, measured) in sets.items():
        if measured.labels is not None:
            matched[name] = "name" if names and images.classes else "number"
            labels[name] = labels_by_name(
                measured.labels, images.classes, names, option=f"--{name}", other="--probe_train"
            )
    probe = LinearProbe(train.features, train.labels)
    for name, numbers in labels.items():
        if not 0 <= int(numbers.min()) <= int(numbers.max()) < probe.num_classes:
            raise UserError(f"--{name}: has labels outside the classes of --probe_train, 0 to {probe.num_classes - 1}")
        accuracies[f"probe_accuracy_{name}"] = probe.accuracy(sets[name][1].features, numbers)
    return accuracies, matched


def _check_output(option: str, output: str, inputs: dict[str, str]) -> None:
    """Before the hours of work, not after; and nothing that it reads is overwritten."""
    path = Path(output)
    ancestor = next(folder for folder in path.absolute().parents if folder.exists())
    if not (ancestor.is_dir() and os.access(ancestor, os.W_OK)):
        raise UserError(f"{option} {output}: {ancestor} is not a folder that can be written")
    if path.is_dir():
        raise UserError(f"{option} {output}: is a folder; give the name of a file")
    for name, source in inputs.items():
        if source.endswith(".npz") and path.with_suffix(".npz").resolve() == Path(source).resolve():
            raise UserError(f"{option} {output}: is {name} or the record beside it; give another file")
