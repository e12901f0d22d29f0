"""TokenizerModule: training of the sequential diffusion tokenizer."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import update_bn

from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.transforms import to_float
from dar_lightning.errors import UserError, require
from dar_lightning.metrics.codebook import CodebookUse
from dar_lightning.tokenizer.config import TOKEN_FIELDS, TokenizerConfig
from dar_lightning.tokenizer.init import TokenizerInit
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.training.losses import AdversarialLoss, PerceptualLoss, RepaLoss
from dar_lightning.training.module import TrainingModule, choose_config, counted_rows, init_from_pretrained
from dar_lightning.training.optim import OptimizerConfig


class TokenizerModule(TrainingModule):
    """Flow matching plus codebook losses (paper, section 3.1).

    Args:
        config: hyperparameters of the tokenizer.
        optimizer: AdamW settings.
        init_from: a folder or Hub repository whose weights training starts from; unlike `ckpt_path` it brings
            weights only.
        freeze_encoder: leave encoder and codebook as init_from, which this needs, brought them, and train conditioner
            and decoder alone: every image keeps its tokens, and an AR model of them stays valid. Token shards name the
            whole tokenizer that made them: made anew, they hold the same tokens. The quantizer's losses are logged, and
            move nothing.
        preset: instead of config, the name of one: v1, light or tiny.
        perceptual: LPIPS of the jump estimate; None leaves it out.
        repa: alignment with a frozen teacher, for a config with a repa_layer; None leaves it out.
        adversarial: a PatchGAN that judges the jump estimate; None leaves it out. Its gradients are clipped apart from
            the tokenizer's, so that neither scales the other down.
        compile: torch.compile every transformer block; on a CPU this needs a C++ compiler.
        activation_checkpointing: parts whose blocks compute their activations again in the backward pass instead of
            keeping them: less memory, one more forward pass of these parts, the same gradients.
        init: initial weights, where they differ from the official ones; with init_from, of tensors that do not fit it.
    """

    def __init__(
        self,
        config: TokenizerConfig = TokenizerConfig(),  # noqa: B008  (frozen)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  (frozen)
        init_from: str | None = None,
        freeze_encoder: bool = False,
        preset: str | None = None,
        perceptual: PerceptualLoss | None = None,
        repa: RepaLoss | None = None,
        adversarial: AdversarialLoss | None = None,
        compile: bool = False,
        activation_checkpointing: list[Literal["encoder", "conditioner", "decoder"]] | None = None,
        init: TokenizerInit = TokenizerInit(),  # noqa: B008  (frozen)
    ):
        super().__init__(optimizer)
        config = choose_config(config, preset, TokenizerConfig)
        self.save_hyperparameters({"config": config.to_dict()})
        self.tokenizer = SequentialDiffusionTokenizer(config, init)
        if repa is not None and config.repa_layer is None:
            raise UserError("repa is set and config.repa_layer is null: name the decoder block that REPA reads")
        if repa is None and config.repa_layer is not None:
            # Parameters that no loss reaches would stop DDP at its second step.
            self.tokenizer.decoder.repa_head.requires_grad_(False)
        self.perceptual, self.repa, self.adversarial = perceptual, repa, adversarial
        self.codebook_use = CodebookUse(config.codebook_size)
        self.freeze_encoder = False
        if freeze_encoder and init_from is None:
            raise UserError("freeze_encoder is set and init_from is null: name the weights whose tokens are kept")
        if init_from is not None:
            source = init_from_pretrained(self.tokenizer, init_from)
        if freeze_encoder:
            for name in TOKEN_FIELDS:
                ours, theirs = getattr(config, name), getattr(source, name)
                said = f"freeze_encoder: config.{name} is {ours!r}, and {theirs!r} in {init_from}"
                require(ours == theirs, f"{said}: images would have other tokens")
            self.freeze_tokens()
        for part in activation_checkpointing or ():
            self.tokenizer.get_submodule(part).recompute = True
        if compile:
            self.compile_parts(self.tokenizer.encoder, self.tokenizer.conditioner, self.tokenizer.decoder)

    def freeze_tokens(self) -> None:
        """Keep encoder and codebook, and so the tokens of every image, from now on."""
        self.freeze_encoder = True
        self.tokenizer.encoder.requires_grad_(False)
        self.tokenizer.quantizer.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TokenizerModule":
        super().train(mode)
        if self.freeze_encoder:
            self.tokenizer.encoder.eval()  # in training mode latent_norm would go on counting
            self.tokenizer.quantizer.eval()
        return self

    def check_data(self, data: Any) -> None:
        """Refuse images of another size than the model's, before the first is read where the data says it."""
        if isinstance(data, ImageNetDataModule) and data.image_size != (mine := self.tokenizer.config.image_size):
            raise UserError(f"data.image_size is {data.image_size}, config.image_size {mine}: give both the same")

    def setup(self, stage: str) -> None:
        self.check_data(getattr(self.trainer, "datamodule", None))

    def read_images(self, pixels: Tensor, batch_idx: int) -> Tensor:
        """A batch's pixels as the model takes them: 0 to 255, (B, 3, S, S) -> float32 in [-1, 1].

        Raises:
            UserError: they are of another size or range; the range of floats is looked at in batch 0 only.
        """
        size = self.tokenizer.config.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            shape = f"(B, 3, {size}, {size}), as config.image_size is {size}"
            raise UserError(f"data: a batch's image is {tuple(pixels.shape)}: need {shape}")
        if pixels.dtype != torch.uint8 and batch_idx == 0:
            least, most = float(pixels.min()), float(pixels.max())
            if least < 0 or most <= 1:
                found = f"{str(pixels.dtype).removeprefix('torch.')} from {least:.3g} to {most:.3g}"
                raise UserError(f"data: a batch's image is {found}: give uint8, or floats from 0 to 255")
        return to_float(pixels)

    def training_step(self, batch: dict, batch_idx: int) -> dict[str, Tensor]:
        images = self.read_images(batch["image"], batch_idx)
        losses = self.tokenizer.training_losses(images, torch.rand(len(images), device=images.device))
        loss, parts = self.total_loss(losses, images, share_of_tokens(losses["read"]))
        parts = {name: part.detach() for name, part in parts.items()}  # callbacks may keep them, not a step's graph
        seen = {name: losses[name] for name in ("latents", "codes", "flow_each", "group")}
        return {"loss": loss, "parts": parts} | seen

    @property
    def norms_of_average(self) -> list[nn.Module]:
        """Layers whose statistics an average of the weights gathers itself, see EMA: that of `latent_norm: batch`."""
        norm = self.tokenizer.encoder.latent_norm
        return [] if norm is None or self.freeze_encoder else [norm]

    def update_statistics(self, batches: Iterable[Tensor]) -> None:
        """Give `norms_of_average` the mean statistics of batches of pixels, each (B, 3, S, S) from 0 to 255."""
        update_bn(map(to_float, batches), self.tokenizer.encoder)

    def total_loss(
        self, losses: dict[str, Tensor], images: Tensor, codebook_factor: Tensor | float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum that backward starts from; and its parts, unweighted: "loss" is it without the discriminator's own.

        `losses` are those of `training_losses` for images (B, 3, H, W) in [-1, 1]; `codebook_factor`: share_of_tokens.
        """
        parts = {"flow": losses["flow"]} | {name: codebook_factor * losses[name] for name in losses["quantizer"]}
        loss = sum(parts.values())
        if self.perceptual is not None and self.perceptual.has_started(self.global_step):
            parts["perceptual"] = self.perceptual(losses["x1_hat"], images, losses["t"])
            loss = loss + self.perceptual.weight * parts["perceptual"]
        if self.repa is not None and self.repa.has_started(self.global_step):
            projected = self.tokenizer.decoder.project_hidden(losses["hidden"], self.repa.grid)
            parts["repa"] = self.repa(projected, images, losses["t"])
            loss = loss + self.repa.weight * parts["repa"]
        elif self.repa is not None:  # DDP waits for a gradient of every parameter
            loss = loss + 0.0 * sum(parameter.sum() for parameter in self.tokenizer.decoder.repa_head.parameters())
        if self.adversarial is None:
            return loss, parts | {"loss": loss}
        parts["adversarial"], parts["discriminator"] = self.adversarial(losses["x1_hat"], images, losses["t"])
        if self.adversarial.has_started(self.global_step):
            loss = loss + self.adversarial.weight * parts["adversarial"]
        return loss + parts["discriminator"], parts | {"loss": loss}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        if self.adversarial is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for part in (self.tokenizer, self.adversarial):
            clip_grad_norm_(part.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["freeze_encoder"] = self.freeze_encoder

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        frozen = checkpoint.get("freeze_encoder", False)
        resumes = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if resumes and frozen != self.freeze_encoder:
            raise UserError(
                f"freeze_encoder is {self.freeze_encoder}, and was {frozen} in the run of the checkpoint: give it that "
                "value, or begin a run of its own with init_from"
            )
        has = any(name.startswith("adversarial.") for name in checkpoint["state_dict"])
        if has != (self.adversarial is not None):
            given, kept = ("null", "a") if has else ("set", "no")
            raise UserError(
                f"adversarial is {given} and the checkpoint has {kept} discriminator: give it the value that the "
                "checkpoint was trained with, or begin a run of its own with init_from"
            )

    def evaluate_batch(self, batch: dict, batch_idx: int, stage: str) -> dict[str, Tensor] | None:
        """Log means; returns the valid images with their times, noise and losses, None of padding alone."""
        images, (kept, count) = self.read_images(batch["image"], batch_idx), counted_rows(batch["valid"])
        generator = torch.Generator().manual_seed(batch_idx)
        u = self.tokenizer.schedule.stratified_times(len(images), generator).to(images.device)
        noise = torch.randn(images.shape, generator=generator).to(images)
        inputs = {"images": images[kept], "u": u[kept], "noise": noise[kept]}
        losses = self.tokenizer.training_losses(**inputs)
        if count:
            self.codebook_use.update(losses["codes"])
        self.log_means({f"{stage}/{name}": losses[name] for name in ("flow", *losses["quantizer"])}, count)
        return inputs | {name: losses[name] for name in ("codes", "flow_each", "group")} if count else None

    def on_validation_epoch_end(self) -> None:
        use, perplexity = self.codebook_use.compute()
        stage = "test" if self.trainer.testing else "val"
        self.log_dict({f"{stage}/codebook_use": use, f"{stage}/codebook_perplexity": perplexity})
        self.codebook_use.reset()

    on_test_epoch_end = on_validation_epoch_end


def share_of_tokens(count: Tensor) -> Tensor:
    """What turns an average over this device's `count` tokens into its share of the average over all devices' tokens.

    The mean of the devices' losses is then the loss of one device with all the images.
    """
    if not dist.is_initialized():
        return torch.ones_like(count)
    total = count.clone()
    dist.all_reduce(total)  # not Trainer.strategy.reduce, which makes the CPU wait for the GPU
    return count * dist.get_world_size() / total
