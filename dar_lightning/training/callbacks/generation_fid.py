"""Generation FID (gFID) in validation, on class-balanced samples."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from dar_lightning.errors import UserError
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.metrics.features import feature_protocol
from dar_lightning.metrics.image_set import ImageSet
from dar_lightning.metrics.images import DrawnImages, open_images
from dar_lightning.metrics.statistics_file import check_fits, read_statistics
from dar_lightning.records.protocol import Protocol
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.training.callbacks.frechet import FrechetCallback, MeasuredSet
from dar_lightning.training.callbacks.stop import StopOnSignal
from dar_lightning.training.fsdp import whole_model


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
        guidance: scale, or (a, b), linear over the tokens.
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
        guidance: float | tuple[float, float] = 1.0,
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
        if batch_size < 1:
            raise UserError(f"GenerationFID: batch_size is {batch_size}, it must be at least 1")
        self.tokenizer_path, self.source, self.num_samples, self.seed = tokenizer, reference, num_samples, seed
        self.options = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.options |= {"solver": solver, "num_steps": num_steps}
        self.batch_size = batch_size
        self._tokenizer: SequentialDiffusionTokenizer | None = None
        self._images: ImageSet | None = None
        self._reference_facts: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage not in ("fit", "validate") or self._tokenizer is not None:
            return
        if not hasattr(pl_module, "ar"):
            raise UserError(f"GenerationFID: {type(pl_module).__name__} has no AR model; ReconstructionFID is for it")
        if self.num_samples < 2:
            raise UserError(f"GenerationFID: num_samples is {self.num_samples}, need 2 or more")
        self._tokenizer = SequentialDiffusionTokenizer.from_pretrained(self.tokenizer_path).requires_grad_(False)
        DARPipeline(self._tokenizer, pl_module.ar)  # says so if they do not belong together
        self._images = self._open_reference(trainer.world_size)

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx or dataloader_idx or not self.due:
            return
        if self.reference is None:
            measured = self._measured(self._images, trainer, pl_module, identified=True)
            self.reference = measured.gathered()
            self._reference_facts |= {"n": self.reference.count, "sha256": measured.sha256(trainer)}
        pipeline = DARPipeline(self._tokenizer.to(pl_module.device), whole_model(pl_module.ar))
        drawn = DrawnImages(pipeline, self.num_samples, self.seed, rows=self.batch_size, **self.options)
        size = self._tokenizer.config.image_size
        ema = {"tokenizer": self._tokenizer.averaged, "ar": self.averaged(trainer)}
        samples = drawn.protocol | {"ema": ema} if trainer.is_global_zero else {}
        protocol = Protocol(samples, self._reference_facts, [size, size], {})
        self.report(trainer, self._measured(drawn, trainer, pl_module).gathered(), protocol)

    def _open_reference(self, world_size: int) -> ImageSet | None:
        """Images to measure, or None where the file has the statistics."""
        option, size = "GenerationFID: reference", self._tokenizer.config.image_size
        stored = read_statistics(self.source, option)
        if stored is not None:
            sha256 = feature_protocol(self.features, self._network.network)["sha256"]
            if check_fits(stored, self.source, self.features, sha256):
                self.reference = stored.statistics
                self._reference_facts = {"npz": self.source} | stored.facts()
                return None
        images = open_images(self.source, option, size)
        if len(images) < max(2, world_size):
            raise UserError(f"{option}: {self.source} has {len(images)} image(s), need {max(2, world_size)} or more")
        self._reference_facts = dict(images.protocol)
        return images

    def _measured(
        self, images: ImageSet, trainer: Trainer, pl_module: LightningModule, identified: bool = False
    ) -> MeasuredSet:
        """A set of which every rank measures its share."""
        measured, size = MeasuredSet(self._network), self._tokenizer.config.image_size
        stops = [callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal)]
        batches = images.batches(self.batch_size, trainer.global_rank, trainer.world_size)
        for _ in range(math.ceil(len(images) / (self.batch_size * trainer.world_size))):  # of rank 0, which has most
            for stop in stops:
                stop.obey_in_validation(trainer, pl_module)
            with trainer.precision_plugin.val_step_context():  # as `precision` has it; features are outside of it
                pixels, _ = next(batches, (None, None))
            if pixels is None:
                continue
            if pixels.shape[2:] != (size, size):
                raise UserError(
                    f"GenerationFID: {self.source} has images of {pixels.shape[2]}x{pixels.shape[3]}, the tokenizer "
                    f"makes {size}x{size}"
                )
            first = len(measured.digests)
            numbers = [trainer.global_rank + (first + i) * trainer.world_size for i in range(len(pixels))]
            measured.add(pixels.to(pl_module.device), numbers=numbers if identified else None)
        if measured.statistics is None:  # more ranks than batches
            measured.add(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=pl_module.device), count=0)
        return measured
