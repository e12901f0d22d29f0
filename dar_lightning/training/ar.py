"""Training of the autoregressive model on token sequences."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.errors import UserError
from dar_lightning.formats.pretrained import build_config
from dar_lightning.layers import compile_blocks
from dar_lightning.training.batch_plan import TrainingPlan
from dar_lightning.training.init_from import init_from_pretrained
from dar_lightning.training.optim import OptimizerConfig, configure_adamw
from dar_lightning.training.seeding import seed_batch
from dar_lightning.training.step_means import StepMeans


class ARModule(LightningModule):
    """Next-token prediction with class dropout (paper, section 3.2).

    Args:
        config: hyperparameters of the model.
        optimizer: AdamW settings.
        init_from: a folder or Hub repository whose weights training starts from; unlike `ckpt_path` it brings
            weights only.
        preset: instead of config, the name of one: B, L, XL, XXL and so on.
        compile: torch.compile every transformer block; on a CPU this needs a C++ compiler.
        activation_checkpointing: let the blocks compute their activations again in the backward pass instead of
            keeping them: less memory, one more forward pass, the same gradients.
    """

    orders: tuple[str, ...] = ("coarse_to_fine",)  # that `config.order` may name

    def __init__(
        self,
        config: ARConfig = ARConfig(),  # noqa: B008  (frozen)
        optimizer: OptimizerConfig = OptimizerConfig(lr=4e-4, weight_decay=0.05),  # noqa: B008  (frozen)
        init_from: str | None = None,
        preset: str | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if preset is not None:
            if config != ARConfig():
                raise UserError(f"preset is {preset!r} and config is given too: keep one of them")
            config = ARConfig.preset(preset)
        elif isinstance(config, Mapping):  # what checkpoints keep; in the annotation, configs would pass unchecked
            config = build_config(ARConfig, config, "config")
        if config.order not in self.orders:
            raise UserError(
                f"config.order is {config.order!r}: {type(self).__name__} trains coarse_to_fine, "
                "dar_lightning.training.AblationModule the others"
            )
        self.save_hyperparameters({"config": config.to_dict()})
        self.ar = ARModel(config)
        self.optimizer = optimizer
        self.step_means = StepMeans()
        if init_from is not None:
            init_from_pretrained(self.ar, init_from)
        self.ar.recompute = activation_checkpointing
        if compile:
            compile_blocks(self.ar)

    def check_data(self, data: CodesDataModule) -> None:
        """Refuse tokens or labels that the model has no embedding for.

        Raises:
            UserError: naming the first value of the config that does not fit.
        """
        config = self.ar.config
        self.check_num_tokens(data)
        for name, mine, needed in (
            ("vocab_size", config.vocab_size, data.codebook_size),
            ("num_classes", config.num_classes, data.num_classes),
        ):
            if mine < needed:
                raise UserError(f"{name} is {mine} in the config, the data needs {needed}")
        for split in ("train", "val"):
            if getattr(data, split) is not None:
                data.index(split).check_labels(config.num_classes)

    def check_num_tokens(self, data: CodesDataModule) -> None:
        if self.ar.config.num_tokens != data.num_tokens:
            raise UserError(
                f"num_tokens is {self.ar.config.num_tokens} in the config: the data has {data.num_tokens} per image"
            )

    def setup(self, stage: str) -> None:
        if isinstance(data := getattr(self.trainer, "datamodule", None), CodesDataModule):
            self.check_data(data)

    def configure_optimizers(self):
        plan = TrainingPlan.of(self.trainer)
        return configure_adamw(self.ar, self.optimizer, plan.steps, plan.steps_per_epoch)

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        seed_batch(self.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def arrange(self, codes: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N) of the data as the model writes them, and their places (B, N), or None for their own."""
        return codes, None

    def training_step(self, batch: dict, batch_idx: int) -> dict[str, Tensor | None]:
        codes, order = self.arrange(batch["codes"])
        logits = self.ar(batch["label"], codes, order)  # (B, N, V)
        token_loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none")
        loss = token_loss.mean()
        return {"loss": loss, "token_loss": token_loss.detach().view_as(codes), "order": order}

    def on_train_batch_end(self, outputs: dict, batch: dict, batch_idx: int) -> None:
        self.step_means.add(self, {"loss": outputs["loss"]})

    def validation_step(self, batch: dict, batch_idx: int) -> dict[str, Tensor] | None:
        return self._evaluate(batch, "val", batch_idx)

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self._evaluate(batch, "test", batch_idx)

    def _evaluate(self, batch: dict, stage: str, batch_idx: int) -> dict[str, Tensor] | None:
        """Logs means; returns loss and hit of each valid token (b, N), or None where there is none."""
        codes, valid = batch["codes"], batch["valid"]
        count = int(valid.sum())
        kept = valid if count else ~valid  # a rank's batch of padding alone is logged too, with a weight of zero
        logits = self.ar(batch["label"], codes)
        token_loss = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")[kept]
        hit = (logits.argmax(dim=-1) == codes)[kept].float()
        values = {f"{stage}/loss": token_loss.mean(), f"{stage}/accuracy": hit.mean()}
        # ranks average the weights; integers would be cut
        self.log_dict(values, batch_size=float(count), sync_dist=True, prog_bar=True)
        return {"token_loss": token_loss, "hit": hit} if count else None
