"""ARModule: training of the autoregressive model on token sequences."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_lightning.ar.conditions import read_options
from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.ar.order import placed
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.errors import require
from dar_lightning.training.module import TrainingModule, choose_config, counted_rows, init_from_pretrained
from dar_lightning.training.optim import OptimizerConfig
from dar_lightning.weights.backbone import load_backbone, read_backbone


class ARModule(TrainingModule):
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
        super().__init__(optimizer)
        config = choose_config(config, preset, ARConfig)
        config = replace(config, condition_options=read_options(config.condition_options))
        config, folder = read_backbone(config)
        said = f"config.order is {config.order!r}: {type(self).__name__} trains coarse_to_fine"
        require(config.order in self.orders, f"{said}, dar_lightning.training.AblationModule the others")
        self.save_hyperparameters({"config": config.to_dict()})
        self.ar = ARModel(config)
        if folder is not None:
            load_backbone(self.ar, folder)
        if init_from is not None:
            init_from_pretrained(self.ar, init_from)
        self.ar.recompute = activation_checkpointing
        if compile:
            need = f"only our Llama's blocks are, backbone is {config.backbone!r}: leave it out"
            require(self.ar.backbone is None, f"compile: {need}")
            self.compile_parts(self.ar)
        # DDP would send these constants from rank 0 to all in every forward pass.
        constants = [*self.ar.tables(), "passes", "condition_embedding.tokenizer"]
        if self.ar.backbone is not None:
            constants += [f"backbone.{name}" for name in self.ar.backbone.tables()]
        self._ddp_params_and_buffers_to_ignore = [f"ar.{name}" for name in constants]

    def check_data(self, data: CodesDataModule) -> None:
        """Refuse tokens or conditions that the model has no embedding for, naming the config's value that is wrong."""
        config = self.ar.config
        self.check_num_tokens(data)
        codes = data.codebook_size
        require(config.vocab_size >= codes, f"vocab_size is {config.vocab_size} in the config, the data needs {codes}")
        self.ar.condition.check_data(data)

    def check_num_tokens(self, data: CodesDataModule) -> None:
        mine, theirs = self.ar.config.num_tokens, data.num_tokens
        require(mine == theirs, f"num_tokens is {mine} in the config: the data has {theirs} per image")

    def setup(self, stage: str) -> None:
        if isinstance(data := getattr(self.trainer, "datamodule", None), CodesDataModule):
            self.check_data(data)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another config: its weights may fit, and would mean other words, or another order."""
        now, noted = self.ar.config.to_dict(), checkpoint.get("hyper_parameters")
        config = noted.get("config") if isinstance(noted, Mapping) else None
        was = now | (config if isinstance(config, Mapping) else {})
        names = now.keys() - {"condition_options"}
        pairs = {name: (was[name], now[name]) for name in sorted(names) if not name.endswith("_dropout")}
        before, after = was["condition_options"], now["condition_options"]
        pairs |= {f"condition_options.{name}": (before.get(name), after.get(name)) for name in before | after}
        pairs.pop("condition_options.encoder", None)  # a place, which may change: sha256 says which encoder
        for name, (old, new) in pairs.items():
            said = f"cannot resume: config.{name} was {old!r:.60} in the checkpoint and is {new!r:.60} now"
            require(old == new, f"{said}; use the same, or start a new run from its weights")

    def arrange(self, codes: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N) of the data as the model writes them, and their places (B, N), or None for their own."""
        return codes, None

    def condition(self, batch: dict) -> Tensor:
        """What the model is told of each sample, from a batch of the data."""
        return self.ar.condition.from_data(batch).to(batch["codes"].device)

    def training_step(self, batch: dict, batch_idx: int) -> dict:
        codes, order = self.arrange(batch["codes"])
        logits = self.ar(self.condition(batch), codes, order)  # (B, N, V)
        token_loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
        loss = token_loss.mean()
        return {"loss": loss, "parts": {"loss": loss.detach()}} | in_place({"token_loss": token_loss.detach()}, order)

    def evaluate_batch(self, batch: dict, batch_idx: int, stage: str) -> dict[str, Tensor] | None:
        """Log means; returns loss, hit and, with an order, entropy of each token (b, N), or None of padding alone."""
        kept, count = counted_rows(batch["valid"])
        codes, order = self.arrange(batch["codes"], torch.Generator().manual_seed(batch_idx))
        log_p = F.log_softmax(self.ar(self.condition(batch), codes, order)[kept], dim=-1)  # (b, N, V)
        codes = codes[kept]
        values = {"token_loss": -log_p.gather(2, codes[:, :, None])[:, :, 0]}
        values["hit"] = (log_p.argmax(dim=-1) == codes).float()
        if order is not None:
            order = order[kept]
            values["entropy"] = -(log_p.exp() * log_p).sum(dim=-1)
        curves = {"token_loss": "loss", "hit": "accuracy", "entropy": "entropy"}
        self.log_means({f"{stage}/{curves[name]}": each.mean() for name, each in values.items()}, count, prog_bar=True)
        return in_place(values, order) if count else None


def in_place(values: dict[str, Tensor], order: Tensor | None) -> dict[str, Tensor | None]:
    """Values (B, N) of written tokens at the tokens' places in the image's sequence; and the order itself."""
    if order is not None:
        values = {name: placed(value, order) for name, value in values.items()}
    return values | {"order": order}
