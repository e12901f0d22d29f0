"""FID in validation: of reconstructions (rFID, with PSNR, SSIM and LPIPS) and of class-balanced samples (gFID)."""

import itertools
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from dar_lightning.ar.guidance import Guidance, read_guidance
from dar_lightning.ar.sampling import check_filter
from dar_lightning.errors import UserError, require
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.metrics.features import FrozenNetwork, feature_protocol, frechet_name, load_features
from dar_lightning.metrics.frechet import Gaussian, check_fits, frechet_distance, read_statistics
from dar_lightning.metrics.images import DrawnImages, ImageSet, open_images
from dar_lightning.metrics.lpips import lpips_network
from dar_lightning.metrics.measure import Measured, float64_device
from dar_lightning.metrics.reconstruction import reconstruct, reconstruction_protocol, reconstruction_scores
from dar_lightning.records.protocol import FRECHET, Protocol, write_metrics
from dar_lightning.records.provenance import provenance
from dar_lightning.tokenizer.flow import check_diffusion
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.training.callbacks.stop import StopOnSignal
from dar_lightning.training.fsdp import whole_model
from dar_lightning.weights.lightning import has_average


class FrechetCallback(Callback):
    """Logs a Frechet distance in validations, on EMA weights if the run averages them, and writes it with its protocol.

    Files are as `dar evaluate` writes them, in `evaluation/` of the run's folder. One of `dar validate` replaces none;
    in training, one that cannot be written costs a line. Weights are used after validation batches alone, where the
    average is in place wherever its callback stands in the list.
    """

    due = False  # whether the validation at hand is to be measured

    def __init__(self, prefix: str, features: str, features_weights: str | None, every_n_steps: int, label: str | None):
        if every_n_steps < 1:
            raise UserError(f"every_n_steps is {every_n_steps}: give at least 1, which measures in all validations")
        if label is not None and not re.fullmatch(r"[\w.-]+", label):
            raise UserError(f"label is {label!r}: it is part of file names, use letters, digits and _ . -")
        self.features, self.features_weights = features, features_weights
        self.ending = "" if label is None else f"-{label}"  # of names in logs and of files
        self.metric = f"{prefix}{frechet_name(features)}"  # the name in the file
        self.every_n_steps = every_n_steps
        self.reference: Gaussian | None = None  # measured once
        self.reference_facts: dict[str, Any] = {}
        self._measured_at = 0  # training step of the last measurement
        self._checkpoint_averaged: bool | None = None
        self._network: FrozenNetwork | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "validate") and self._network is None:
            option = f"{type(self).__name__}: features"
            self._network = FrozenNetwork(load_features(self.features, self.features_weights, option))

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=f"{self.metric}{self.ending}")

    def state_dict(self) -> dict[str, int]:
        return {"measured_at": self._measured_at}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._measured_at = state_dict["measured_at"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Outside of training, what a checkpoint calls "state_dict" is used.
        self._checkpoint_averaged = has_average(checkpoint)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        passed = trainer.global_step // self.every_n_steps > self._measured_at // self.every_n_steps
        self.due = not trainer.sanity_checking and (passed or not _training(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.due and _training(trainer):
            self._measured_at = trainer.global_step

    def averaged(self, trainer: Trainer) -> bool | None:
        """Whether the weights that are measured are an average over training steps; None where nothing tells."""
        if not _training(trainer):
            return self._checkpoint_averaged
        averages = [found._average_model for found in trainer.callbacks if isinstance(found, WeightAveraging)]
        return any(average.n_averaged > 0 for average in averages)

    def report(
        self, trainer: Trainer, measured: Gaussian, samples: dict, size: list[int], methods: dict, others: dict
    ) -> None:
        """Log the distance from the reference, and other metrics of all ranks, and write them with their protocol."""
        device = trainer.strategy.root_device  # since NCCL reduces no tensor of the CPU
        value, training, step = frechet_distance(measured, self.reference), _training(trainer), trainer.global_step
        metrics = {self.metric: torch.tensor(value, dtype=torch.float32, device=device)} | others
        named = {f"val/{name}{self.ending}": metric.float() for name, metric in metrics.items()}
        trainer.lightning_module.log_dict(named, sync_dist=True, batch_size=1)
        if not trainer.is_global_zero:
            return
        facts = {"step": step if training else None, "checkpoint": trainer.ckpt_path and str(trainer.ckpt_path)}
        facts |= {"precision": trainer.precision, "n": measured.count} | samples
        network = feature_protocol(self.features, self._network.network) | {"dim": len(measured.mean)}
        methods = methods | {"features": network, "frechet": FRECHET}
        protocol = Protocol(facts, self.reference_facts, size, methods, provenance(device, trainer.precision))
        numbers = {name: metric.item() if metric.isfinite() else None for name, metric in others.items()}
        ends = itertools.chain([""], map("-{}".format, itertools.count(2)))
        folder = Path(trainer.default_root_dir) / "evaluation"
        paths = (folder / f"{self.metric}{self.ending}-{step:07d}{end}.json" for end in ends)
        path = next(path for path in paths if training or not path.exists())
        try:
            write_metrics(path, {self.metric: value} | numbers, protocol)
        except UserError as error:
            if not training:
                raise
            goes_on = f"val/{self.metric}{self.ending} of step {step} is {value:.6g}; training goes on"
            print(f"WARNING: {error}; {goes_on}", file=sys.stderr, flush=True)


def _training(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


class ReconstructionFID(FrechetCallback):
    """Frechet distance between validation images and their reconstructions, both from the same crops and as uint8.

    Logs `val/rFID` (`val/rFD-<name>` with another network than Inception), `val/rPSNR` (dB), `val/rSSIM` and, with its
    network, `val/rLPIPS`, all over the same images; see `metrics.reconstruction` for their protocol. Originals are
    measured once per process. Images that only fill up a batch do not count.

    Args:
        num_samples: images whose number in the shards is below this; None takes the whole validation set.
        features: feature network: inception, mobilenet_v2, color_edges, a timm model or a class path.
        features_weights: a local file of its weights; None downloads them.
        lpips: a file of torchvision's VGG16, or "download"; None leaves LPIPS out.
        seed: with an image's number in the shards it seeds the noise that its decoding starts from.
        solver: adams2, euler or adams2_variable.
        num_steps: diffusion steps; None is one per group of tokens.
        every_n_steps: measure in the first validation at or after each multiple of so many training steps.
        label: ends the names in logs and of files (val/rFID-euler), for a second of these callbacks.
    """

    def __init__(
        self,
        num_samples: int | None = None,
        features: str = "inception",
        features_weights: str | None = None,
        lpips: str | None = None,
        seed: int = 0,
        solver: str = "adams2",
        num_steps: int | None = None,
        every_n_steps: int = 1,
        label: str | None = None,
    ):
        super().__init__("r", features, features_weights, every_n_steps, label)
        if num_samples is not None and num_samples < 2:
            raise UserError(f"ReconstructionFID: num_samples is {num_samples}, a Frechet distance needs 2 or more")
        check_diffusion(solver, num_steps)
        self.num_samples, self.seed = num_samples, seed
        self.options = {"solver": solver, "num_steps": num_steps}
        self._lpips = None if lpips is None else lpips_network(lpips)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "tokenizer"):
            raise UserError(f"ReconstructionFID: {type(pl_module).__name__} has no tokenizer; GenerationFID is for it")
        others = [found for found in trainer.callbacks if isinstance(found, ReconstructionFID) and found is not self]
        if any(found.ending == self.ending for found in others):
            raise UserError(f"ReconstructionFID: two of them log val/rPSNR{self.ending}, give one another label")
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._originals, self._decoded = (Measured(self._network, pl_module.device) for _ in range(2))
        # a sum over images for each metric, and their number
        self._sums = torch.zeros(4 if self._lpips else 3).to(float64_device(pl_module.device), torch.float64)

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if not self.due or dataloader_idx:
            return
        kept = batch["valid"] & (batch["index"] < (math.inf if self.num_samples is None else self.num_samples))  # (B,)
        count = int(kept.sum())
        if not count:
            if not self._decoded.empty:
                return
            kept[0] = True  # a rank without images still takes part in the sums and means, with nothing
        images, numbers = batch["image"][kept], batch["index"][kept].tolist()
        self._size = list(images.shape[2:])
        with trainer.precision_plugin.val_step_context():  # as `precision` has it; features are outside of it
            decoded = reconstruct(pl_module.tokenizer, images, numbers, self.seed, **self.options).decoded
        self._decoded.add(decoded, count=count)
        if self.reference is None:
            self._originals.add(images, numbers[:count], count)
        if count:
            scores = reconstruction_scores(decoded, images, self._lpips)
            sums = [scores[name].to(self._sums).sum() for name in scores]
            self._sums += torch.stack([*sums, torch.full_like(sums[0], count)])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.due:
            return
        if self.reference is None:
            self.reference = self._originals.statistics
            shards = {"shards": getattr(trainer.datamodule, "val", None)}
            self.reference_facts = shards | {"crop": f"ADM centre crop to {self._size[0]}", "n": self.reference.count}
            self.reference_facts["sha256"] = self._originals.sha256
        *sums, count = trainer.strategy.reduce(self._sums, reduce_op="sum")
        names = ["rPSNR", "rSSIM", *(["rLPIPS"] if self._lpips else [])]
        scores = {name: total / count for name, total in zip(names, sums, strict=True)}
        samples = {"reconstructions": "of the reference", "ema": {"tokenizer": self.averaged(trainer)}}
        samples |= {"seed": self.seed, "solver": self.options["solver"]}
        samples["steps"] = self.options["num_steps"] or pl_module.tokenizer.config.num_groups
        methods = {"reconstruction": reconstruction_protocol(self._lpips)}
        self.report(trainer, self._decoded.statistics, samples, self._size, methods, scores)


class GenerationFID(FrechetCallback):
    """Frechet distance between images that the AR model draws and a reference.

    Logs `val/gFID` (`val/gFD-<name>` with another network than Inception). Image i is of class i mod num_classes and
    depends on (seed, i) alone, so every validation and any number of ranks draws the same ones from the same weights.
    The reference is measured once per process. A signal ends training before the next batch of images (StopOnSignal).

    Args:
        tokenizer: folder or Hub repository of the tokenizer that made the training tokens.
        reference: shards, a folder of images or an npz; or an npz of statistics, such as ADM's reference batches.
        num_samples: images to draw in all, 2 or more. Papers draw 50,000.
        features: feature network: inception, mobilenet_v2, color_edges, a timm model or a class path.
        features_weights: a local file of its weights; None downloads them.
        seed: of the images.
        guidance: scale, (a, b), linear over the tokens, or another schedule as text (`ar.guidance`).
        temperature: of the token distribution.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens with this much probability.
        solver: adams2, euler or adams2_variable.
        num_steps: diffusion steps; None is one per group of tokens.
        batch_size: images at a time and per rank; another number rounds differently.
        every_n_steps: measure in the first validation at or after each multiple of so many training steps.
        label: ends the names in logs and of files (val/gFID-guided), for a second of these callbacks.
    """

    def __init__(
        self,
        tokenizer: str,
        reference: str,
        num_samples: int = 5000,
        features: str = "inception",
        features_weights: str | None = None,
        seed: int = 0,
        guidance: Guidance = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        solver: str = "adams2",
        num_steps: int | None = None,
        batch_size: int = 32,
        every_n_steps: int = 1,
        label: str | None = None,
    ):
        super().__init__("g", features, features_weights, every_n_steps, label)
        if batch_size < 1 or num_samples < 2:
            given = f"batch_size is {batch_size} and num_samples is {num_samples}"
            raise UserError(f"GenerationFID: {given}, at least 1 and 2 are needed")
        check_diffusion(solver, num_steps)
        check_filter(temperature, top_k, top_p)
        self.tokenizer_path, self.source, self.num_samples, self.seed = tokenizer, reference, num_samples, seed
        self.batch_size, self.options = batch_size, {"guidance": read_guidance(guidance), "temperature": temperature}
        self.options |= {"top_k": top_k, "top_p": top_p, "solver": solver, "num_steps": num_steps}
        self._tokenizer: SequentialDiffusionTokenizer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage not in ("fit", "validate") or self._tokenizer is not None:
            return
        if not hasattr(pl_module, "ar"):
            raise UserError(f"GenerationFID: {type(pl_module).__name__} has no AR model; ReconstructionFID is for it")
        self._tokenizer = SequentialDiffusionTokenizer.from_pretrained(self.tokenizer_path).requires_grad_(False)
        pipeline = DARPipeline(self._tokenizer, pl_module.ar)  # says so if they do not belong together
        pipeline.guidance_scales(self.options["guidance"])  # and if this does not fit
        _ = pipeline.num_labels  # or if it takes text
        option = "GenerationFID: reference"
        stored = read_statistics(self.source, option)
        if stored is not None:
            sha256 = feature_protocol(self.features, self._network.network)["sha256"]
            if check_fits(stored, self.source, self.features, sha256, option):
                self.reference, self.reference_facts = stored.statistics, {"npz": self.source} | stored.facts()
                return
        self._images = open_images(self.source, option, self._tokenizer.config.image_size)
        if len(self._images) < (fewest := max(2, trainer.world_size)):
            raise UserError(f"{option}: {self.source} has {len(self._images)} image(s), need {fewest} or more")

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx or dataloader_idx or not self.due:
            return
        if self.reference is None:
            originals = self._measured(self._images, trainer, pl_module, numbered=True)
            self.reference = originals.statistics
            self.reference_facts = self._images.protocol | {"n": self.reference.count, "sha256": originals.sha256}
        pipeline = DARPipeline(self._tokenizer.to(pl_module.device), whole_model(pl_module.ar))
        drawn = DrawnImages(pipeline, self.num_samples, self.seed, rows=self.batch_size, **self.options)
        ema = {"tokenizer": self._tokenizer.averaged, "ar": self.averaged(trainer)}
        samples = drawn.protocol | {"ema": ema} if trainer.is_global_zero else {}
        size = 2 * [self._tokenizer.config.image_size]
        self.report(trainer, self._measured(drawn, trainer, pl_module).statistics, samples, size, {}, {})

    def _measured(
        self, images: ImageSet, trainer: Trainer, pl_module: LightningModule, numbered: bool = False
    ) -> Measured:
        """A set of which every rank measures its share; numbered: one that is not drawn, whose pixels are noted."""
        measured, size = Measured(self._network, pl_module.device), self._tokenizer.config.image_size
        stops = [callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal)]
        batches = images.batches(self.batch_size, trainer.global_rank, trainer.world_size)
        numbers, mistake = itertools.count(trainer.global_rank, trainer.world_size), None
        for _ in range(math.ceil(len(images) / (self.batch_size * trainer.world_size))):  # of rank 0, which has most
            for stop in stops:
                stop.obey_in_validation(trainer, pl_module)
            try:
                with trainer.precision_plugin.val_step_context():  # as `precision` has it; features are outside of it
                    pixels, _ = next(batches, (None, None))
                if pixels is not None and pixels.shape[2:] != (size, size):
                    found = f"has images of {pixels.shape[2]}x{pixels.shape[3]}"
                    raise UserError(f"GenerationFID: {self.source} {found}, the tokenizer makes {size}x{size}")
            except UserError as error:  # an image that cannot be decoded: the other ranks are to know
                mistake, pixels, batches = str(error), None, iter(())
            if pixels is not None:
                measured.add(pixels, list(itertools.islice(numbers, len(pixels))) if numbered else ())
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(mistakes := [None] * trainer.world_size, mistake)
            mistake = next(filter(None, mistakes), None)
        require(mistake is None, mistake)
        if measured.empty:  # more ranks than batches
            measured.add(torch.zeros(1, 3, size, size, dtype=torch.uint8), count=0)
        return measured
