"""`dar table`: reproduce a table of the paper row by row, beside the paper's numbers."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import lightning as L
import torch

from dar_lightning.ar import gumbel
from dar_lightning.ar.guidance import Guidance, read_guidance
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.devices import choose_device, dtype_name
from dar_lightning.errors import UserError, begin_work, check_range, require
from dar_lightning.files import check_same, read_json, write_json, write_text
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.labels import LabelsDataModule
from dar_lightning.generation.npz import write_npz
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.generation.predict import GenerationModule
from dar_lightning.generation.writer import SampleWriter
from dar_lightning.metrics.features import feature_protocol, frechet_name, load_features
from dar_lightning.metrics.frechet import read_statistics, sha256_of
from dar_lightning.metrics.images import open_images, with_progress
from dar_lightning.metrics.reconstruction import reconstruct_all
from dar_lightning.records.drawn import PIXELS, read_drawn, write_drawn
from dar_lightning.records.pixels import image_digests, set_sha256
from dar_lightning.records.protocol import PAPER_COUNT
from dar_lightning.records.provenance import provenance
from dar_lightning.sweeps.tables import markdown_table, spread_text
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.flow import check_diffusion
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.tokenizer.schedule import GroupSchedule

SAMPLES, MEASURED = "samples.npz", "measured.json"


@dataclass(frozen=True)
class Row:
    """One row: what it changes, and what the paper reports.

    Attributes:
        paper: the paper's numbers by name: FID, IS, precision, recall.
        pipeline: instead of the table's.
        solver: of the diffusion.
        num_steps: diffusion steps; None is the number of groups.
        guidance: scale, (a, b), linear over the tokens, or another schedule as text, as for `dar sample`; for
            generation only.
        groups: stop after so many groups of tokens, and draw no more; None is all.
    """

    paper: dict[str, float] = field(default_factory=dict)
    pipeline: str | None = None
    solver: str = "adams2"
    num_steps: int | None = None
    guidance: Guidance = 1.0
    groups: int | None = None

    def __post_init__(self) -> None:
        check_diffusion(self.solver, self.num_steps)
        object.__setattr__(self, "guidance", read_guidance(self.guidance))


def table(
    title: str,
    task: Literal["generate", "reconstruct"],
    rows: list[Row],
    pipeline: str,
    reference: str,
    output: str,
    features: str = "inception",
    features_weights: str | None = None,
    full: bool = False,
    num_samples: int = PAPER_COUNT,
    seeds: list[int] = [0],  # noqa: B006  (jsonargparse shows it)
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Measure each row and write `table.json`, `table.md` and `table.png`.

    What is measured is kept, in `rowR/seedS/`, and must be of the same models, settings, token draws, reference images
    and feature network when the command is started again: it goes on with what is missing, also within a row.
    `samples.npz` there is what `dar predict` writes, so several GPUs may draw it beforehand; it may be deleted once
    `measured.json` is beside it, and is measured anew if its record tells of other images.

    Args:
        title: heading of the table.
        task: "generate" draws class-balanced images; "reconstruct" encodes and decodes the reference.
        rows: what each row changes.
        pipeline: folder, repository or shipped name of a pipeline; to reconstruct, a tokenizer's does as well.
        reference: an npz, a folder of images or of shards; "reconstruct" takes its images from here.
        output: folder to write to.
        features: the feature network, as for `dar evaluate`: inception gives FID, others FD-<name>.
        features_weights: a local file of the network's weights; left out, they are downloaded.
        full: adds KID, precision and recall, and for inception the Inception Score. Needs torch-fidelity.
        num_samples: images drawn per row and seed; for "reconstruct" as many as the reference has.
        seeds: each row is measured with each; two and more give a standard deviation.
        batch_size: images at a time.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    if not rows or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{len(rows)} rows, seeds {seeds}: need at least one row, and one seed or several that differ")
    check_range(1, batch_size=batch_size)
    check_range(2, num_samples=num_samples)
    place = choose_device(device)
    made = provenance(place, "float32")
    if task == "reconstruct" and any(row.guidance != 1.0 for row in rows):
        raise UserError("rows: guidance is set, but task is reconstruct, which draws no tokens")
    guidances = defaultdict(list)
    for row in rows:
        guidances[row.pipeline or pipeline].append(row.guidance)
    models = {model: _model(model, task, given) for model, given in guidances.items()}
    sha256 = feature_protocol(features, load_features(features, features_weights))["sha256"]
    common = {"task": task, "features": features, "features_sha256": sha256, "full": full}
    common |= {"num_samples": num_samples} if task == "generate" else {}
    references = {
        size: _reference_hashes(reference, size, batch_size, full)
        for size in dict.fromkeys(config.image_size for config, *_ in models.values())
    }
    measuring = {"reference": reference, "features": features, "features_weights": features_weights, "full": full}
    measuring |= {"paired": task == "reconstruct", "batch_size": batch_size, "device": device}
    root, results = Path(output), []
    begin_work()
    for number, row in enumerate(rows):
        model = row.pipeline or pipeline
        config, num_groups, hashes = models[model]
        measured = []
        for seed in seeds:
            folder = root / f"row{number}" / f"seed{seed}"
            settings = {name: value for name, value in asdict(row).items() if name != "paper"}
            asked = common | {"settings": settings, "seed": seed} | hashes | references[config.image_size]
            found = _read(folder, json.loads(json.dumps(asked)))
            if found is None:
                samples, out = str(folder / SAMPLES), str(folder / "evaluation.json")
                if task == "generate":
                    _generate(model, row, seed, num_samples, batch_size, place, samples)
                else:
                    _reconstruct(model, row, seed, reference, batch_size, place, folder / SAMPLES)
                found = asked | evaluate(samples, output=out, image_size=config.image_size, **measuring)
                write_json(folder / MEASURED, found)
            measured.append(found)
        results.append(_summary(row, model, config, num_groups, measured))
    _write(root, title, frechet_name(features), results, made)


def _model(model: str, task: str, guidances: list[Guidance]) -> tuple[TokenizerConfig, int, dict[str, str]]:
    """The tokenizer's config, how many groups there are to decode, and what else decides: models' hashes, the draws."""
    if task == "reconstruct":
        tokenizer = SequentialDiffusionTokenizer.from_pretrained(model)
        return tokenizer.config, tokenizer.config.num_groups, {"tokenizer_sha256": model_sha256(tokenizer)}
    pipe = DARPipeline.from_pretrained(model)
    for guidance in guidances:
        pipe.guidance_scales(guidance)  # says so if it does not fit
    hashes = {"tokenizer_sha256": model_sha256(pipe.tokenizer), "ar_sha256": model_sha256(pipe.ar)}
    return pipe.tokenizer.config, pipe.num_groups, hashes | {"token_draws": gumbel.METHOD}


def _reference_hashes(reference: str, size: int, batch_size: int, full: bool) -> dict[str, str]:
    """Hashes of what a reference holds, wherever it lies: statistics, images, or both."""
    stored = read_statistics(reference, "--reference")
    known = {} if stored is None else {"reference_statistics_sha256": sha256_of(stored.statistics)}
    if stored is not None and not stored.has_images:
        require(not full, f"--full: --reference {reference} has statistics only; give its images")
        return known
    batches = with_progress(open_images(reference, "--reference", size), batch_size, "--reference")
    digests = (digest for pixels, _ in batches for digest in image_digests(pixels.permute(0, 2, 3, 1).numpy()))
    return known | {"reference_sha256": set_sha256(digests)}


def _read(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured; None where nothing was, or of other images than lie beside it now."""
    path = folder / MEASURED
    if not path.is_file():
        return None
    found = read_json(path)
    check_same(f"{path} has", found, asked)
    record = read_drawn(folder / SAMPLES)
    return found if record is None or record[PIXELS] == found["protocol"]["samples"]["sha256"] else None


def _generate(
    model: str, row: Row, seed: int, num_samples: int, batch_size: int, place: torch.device, output: str
) -> None:
    accelerator, devices = {"cuda": "gpu"}.get(place.type, place.type), 1 if place.index is None else [place.index]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator=accelerator, devices=devices, callbacks=[SampleWriter(output)], **quiet)
    options = {"solver": row.solver, "num_steps": row.num_steps, "guidance": row.guidance, "groups": row.groups}
    module = GenerationModule(model, seed, rows=batch_size, **options)
    trainer.predict(module, LabelsDataModule(num_samples, batch_size=batch_size, piece_size=4 * batch_size))


def _reconstruct(
    model: str, row: Row, seed: int, reference: str, batch_size: int, place: torch.device, output: Path
) -> None:
    tokenizer = SequentialDiffusionTokenizer.from_pretrained(model).to(place)
    config = tokenizer.config
    originals = open_images(reference, "--reference", config.image_size)
    options = {"solver": row.solver, "groups": row.groups, "num_steps": row.num_steps}
    batches = reconstruct_all(tokenizer, originals, batch_size, seed, **options)
    pieces = (batch.decoded.permute(0, 2, 3, 1).cpu().numpy() for batch in batches)
    pixels = write_npz(output, pieces, (len(originals), config.image_size, config.image_size, 3))
    facts = {
        "reconstructions": originals.protocol,
        "tokenizer_sha256": model_sha256(tokenizer),
        "ema": {"tokenizer": tokenizer.averaged},
        "seed": seed,
        "solver": row.solver,
        "steps": row.num_steps or config.num_groups,
        "groups": row.groups or config.num_groups,
        "batch_size": batch_size,
        "provenance": provenance(place, dtype_name(tokenizer.dtype)),
    }
    write_drawn(output, facts, pixels)


def _summary(
    row: Row, model: str, config: TokenizerConfig, num_groups: int, measured: list[dict[str, Any]]
) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of every metric, beside the paper's."""
    metrics = {}
    for name in measured[0]["metrics"]:
        values = [one["metrics"][name] for one in measured]
        if None not in values:  # an infinite PSNR
            std = stdev(values) if len(values) > 1 else None
            metrics[name] = {"mean": mean(values), "std": std, "values": values}
    tokens = GroupSchedule.from_config(config).tokens_for_groups(row.groups or num_groups)
    settings = {
        "pipeline": model,
        "codebook": config.codebook_size,
        "solver": row.solver,
        "steps": row.num_steps or config.num_groups,
        "guidance": _guidance_name(row.guidance),
        "tokens": f"{tokens} of {config.num_tokens}",
    }
    models = {name: measured[0][name] for name in ("tokenizer_sha256", "ar_sha256") if name in measured[0]}
    summary = {"settings": settings, "paper": row.paper, "metrics": metrics}
    summary |= {"seeds": [one["seed"] for one in measured], "models": models}
    return summary | {"protocol": measured[0]["protocol"]}


def _guidance_name(guidance: Guidance) -> str:
    if isinstance(guidance, str):
        return guidance
    scales = guidance if isinstance(guidance, tuple | list) else [guidance]
    return "none" if guidance == 1 else " to ".join(f"{scale:g}" for scale in scales)


def _write(root: Path, title: str, frechet: str, results: list[dict[str, Any]], made: dict[str, Any]) -> None:
    from dar_lightning.sweeps.plots import plot_table, save_plot  # matplotlib

    names = results[0]["settings"]
    varied = [name for name in names if len({row["settings"][name] for row in results}) > 1] or ["pipeline"]
    protocol, seeds = results[0]["protocol"], ", ".join(map(str, results[0]["seeds"]))
    samples, reference = protocol["samples"]["n"], protocol["reference"]
    real = "the reference's stored statistics" if "statistics" in reference else f"{reference['n']} of reference"
    models = ", ".join(dict.fromkeys(row["settings"]["pipeline"] for row in results))
    caveat = f"{frechet} of {models}: {samples} images, {real}, seeds {seeds}."
    if frechet != "FID" or samples != PAPER_COUNT:
        caveat = f"Small scale: {caveat} This is not the paper's FID of {PAPER_COUNT:,} ImageNet images."
    summary = {"title": title, "caveat": caveat, "rows": results, "provenance": made}
    write_json(root / "table.json", summary, ensure_ascii=False)

    metrics, papers = (list(dict.fromkeys(name for row in results for name in row[of])) for of in ("metrics", "paper"))
    settings = [[str(row["settings"][name]) for name in varied] for row in results]
    lines = []
    for start, row in zip(settings, results, strict=True):
        spreads = {name: spread_text(metric["mean"], metric["std"]) for name, metric in row["metrics"].items()}
        ours = [spreads.get(name, "infinite") for name in metrics]
        lines.append([*start, *ours, *(f"{row['paper'][name]:g}" if name in row["paper"] else "" for name in papers)])
    header = [*varied, *metrics, *(f"paper: {name}" for name in papers)]
    text = "\n".join([f"# {title}", "", caveat, "", *markdown_table(header, lines)])
    write_text(root / "table.md", text + "\n")
    plot = plot_table(title, caveat, frechet, results, ["\n".join(words) for words in settings], ", ".join(varied))
    save_plot(plot, root / "table.png")
    print(text)
