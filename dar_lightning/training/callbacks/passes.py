"""Passes: what several tokens a pass save and what they lose: passes, time an image, and nats lost by group."""

import time

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from dar_lightning.ar.model import ARModel
from dar_lightning.ar.order import placed, written
from dar_lightning.ar.sampling import generate
from dar_lightning.errors import require
from dar_lightning.training.callbacks.monitors import BinnedMean
from dar_lightning.training.log_step import log_bins, log_numbers
from dar_lightning.training.module import counted_rows
from dar_lightning.weights.lightning import load_model


class Passes(Callback):
    """Logs passes an image, the time of its tokens, and the nats lost against a model of one token a pass.

    After each validation: `val/passes`, w + (N - w) / m; and `val/seconds_per_image`, the time of drawing the tokens of
    `draws` images together, without guidance, divided by their number, on this device.

    Nats lost are this model's loss minus a reference's, in nats an image: `groups/val_nats_lost_k` of the tokens of
    group k, from 0, and `val/nats_lost`, their sum. Of two models that predict exactly it is the total correlation of
    each pass's tokens given those before, which independent draws lose. Of others it also has what one model has learnt
    less than the other: give both the same training.

    Args:
        reference: a folder, a repository or a checkpoint of `dar fit`: a model of one token a pass over the same tokens
            and conditions; None: no nats lost.
        draws: images to draw; 0: no time.
        num_groups: groups of tokens, as many as the tokenizer has.
    """

    needs = "ar"  # which model

    def __init__(self, reference: str | None = None, draws: int = 8, num_groups: int = 8):
        require(draws >= 0, f"Passes: draws is {draws}: it must be at least 0")
        self.path, self.draws, self.num_groups = reference, draws, num_groups
        self.reference: ARModel | None = None

    def setup(self, trainer, pl_module, stage) -> None:
        config, groups, device = pl_module.ar.config, self.num_groups, trainer.strategy.root_device
        fits = groups >= 1 and config.num_tokens % groups == 0
        require(fits, f"Passes: num_groups is {groups}: it must divide the {config.num_tokens} tokens")
        if self.path is None:
            return
        self.reference = load_model(self.path, ARModel).to(device).requires_grad_(False)
        needs = {name: getattr(config, name) for name in ("num_tokens", "vocab_size", "condition", "num_classes")}
        for name, needed in {**needs, "tokens_per_pass": 1}.items():
            found = getattr(self.reference.config, name)
            require(found == needed, f"Passes: reference {self.path}: {name} is {found}, need {needed}")
        ours, theirs = (
            {name: value for name, value in of.condition_options.items() if name != "encoder"}  # a place
            for of in (config, self.reference.config)
        )
        require(ours == theirs, f"Passes: reference {self.path}: condition_options differ, such as its vocabulary")
        self._lost = BinnedMean(config.num_tokens).to(device)

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if not batch_idx:
            self._asked = pl_module.condition(batch)
        if outputs is None or self.reference is None:  # padding alone, or nothing to compare with
            return
        kept, _ = counted_rows(batch["valid"])
        codes = batch["codes"][kept]
        order = self.reference.draw_order(len(codes), torch.Generator().manual_seed(batch_idx))
        codes = written(codes, order)
        with trainer.precision_plugin.val_step_context():
            logits = self.reference(pl_module.condition(batch)[kept], codes, order)
        loss = placed(F.cross_entropy(logits.transpose(1, 2), codes, reduction="none"), order)
        self._lost.update(outputs["token_loss"] - loss)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        values = {"val/passes": pl_module.ar.config.passes}
        if self.draws and not trainer.sanity_checking:
            asked = self._asked[torch.arange(self.draws, device=self._asked.device) % len(self._asked)]
            for _ in range(2):  # the first drawing of a shape may compile and capture graphs
                generators = [torch.Generator().manual_seed(number) for number in range(self.draws)]
                start = time.perf_counter()
                with trainer.precision_plugin.val_step_context():
                    generate(pl_module.ar, asked, generator=generators).cpu()  # waits for a GPU
            values["val/seconds_per_image"] = (time.perf_counter() - start) / self.draws
        if self.reference is not None:
            lost = self._lost.pop().cpu().view(self.num_groups, -1).sum(dim=1)
            log_bins(pl_module, "groups/val_nats_lost", lost)
            values["val/nats_lost"] = float(lost.sum())
        log_numbers(pl_module, values)
