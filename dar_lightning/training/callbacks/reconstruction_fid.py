"""Reconstruction FID (rFID), PSNR, SSIM and LPIPS in validation."""

import torch
from lightning.pytorch import LightningModule, Trainer

from dar_lightning.errors import UserError
from dar_lightning.metrics.lpips import lpips_network
from dar_lightning.metrics.measure import float64_device
from dar_lightning.metrics.reconstruction import reconstruct, reconstruction_protocol, reconstruction_scores
from dar_lightning.records.protocol import Protocol
from dar_lightning.training.callbacks.frechet import FrechetCallback, MeasuredSet


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
        self.num_samples, self.seed, self.solver, self.num_steps = num_samples, seed, solver, num_steps
        self._lpips = None if lpips is None else lpips_network(lpips)
        self._metrics = ["psnr", "ssim"] + (["lpips"] if lpips else [])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        others = [found for found in trainer.callbacks if isinstance(found, ReconstructionFID) and found is not self]
        if any(found.label == self.label for found in others):
            raise UserError(f"ReconstructionFID: two of them log val/{self.labelled('rPSNR')}, give one another label")
        super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.due:
            return
        self._originals, self._reconstructions = MeasuredSet(self._network), MeasuredSet(self._network)
        # a sum over images for each metric, and their number
        self._scores = torch.zeros(len(self._metrics) + 1, dtype=torch.float64, device=float64_device(pl_module.device))

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if not self.due or dataloader_idx:
            return
        kept = batch["valid"].clone()  # (B,)
        if self.num_samples is not None:
            kept &= batch["index"] < self.num_samples
        count = int(kept.sum())
        if not count:
            if self._reconstructions.statistics is not None:
                return
            kept[0] = True  # a rank without images still takes part in the sums and means, with nothing
        images, numbers = batch["image"][kept], batch["index"][kept].tolist()
        self._size = list(images.shape[2:])
        options = {"solver": self.solver, "num_steps": self.num_steps}
        with trainer.precision_plugin.val_step_context():  # as `precision` has it; features are outside of it
            reconstructions = reconstruct(pl_module.tokenizer, images, numbers, self.seed, **options).decoded
        self._reconstructions.add(reconstructions, count)
        if self.reference is None:
            self._originals.add(images, count, numbers)
        if count:
            scores = reconstruction_scores(reconstructions, images, self._lpips)
            sums = [scores[name].to(self._scores).sum() for name in self._metrics]
            self._scores += torch.stack([*sums, torch.full_like(sums[0], count)])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.due:
            return
        if self.reference is None:
            self.reference = self._originals.gathered()
            self._sha256 = self._originals.sha256(trainer)
        *sums, count = trainer.strategy.reduce(self._scores, reduce_op="sum")
        scores = {f"r{name.upper()}": total / count for name, total in zip(self._metrics, sums, strict=True)}
        self.report(trainer, self._reconstructions.gathered(), self._protocol(trainer), scores)

    def _protocol(self, trainer: Trainer) -> Protocol:
        steps = trainer.lightning_module.tokenizer.config.num_groups if self.num_steps is None else self.num_steps
        samples = {"reconstructions": "of the reference", "ema": {"tokenizer": self.averaged(trainer)}}
        samples |= {"seed": self.seed, "solver": self.solver, "steps": steps}
        reference = {"shards": getattr(trainer.datamodule, "val", None), "crop": f"ADM centre crop to {self._size[0]}"}
        reference |= {"n": self.reference.count, "sha256": self._sha256}
        return Protocol(samples, reference, self._size, {"reconstruction": reconstruction_protocol(self._lpips)})
