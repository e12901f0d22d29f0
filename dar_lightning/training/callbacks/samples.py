"""Generated samples of fixed classes and seeds in TensorBoard."""

import torch
from lightning.pytorch import Callback
from torchvision.utils import make_grid

from dar_lightning.data.transforms import to_uint8
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.training.callbacks.pictures import log_picture, writers
from dar_lightning.training.fsdp import whole_model


class Samples(Callback):
    """In each validation, draws a grid with a row per class.

    Args:
        tokenizer: folder or Hub repository of the tokenizer that made the training tokens.
        classes: class indices; None takes all, at most 20.
        per_class: images per class.
        guidance: scale, or (a, b).
    """

    def __init__(
        self,
        tokenizer: str,
        classes: list[int] | None = None,
        per_class: int = 4,
        guidance: float | tuple[float, float] = 1.0,
    ):
        self.path, self.classes, self.per_class, self.guidance = tokenizer, classes, per_class, guidance
        self.tokenizer: SequentialDiffusionTokenizer | None = None

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        # After the first batch, not at the end of the epoch, when the average may have been taken away.
        if batch_idx or dataloader_idx or trainer.sanity_checking:
            return
        ar = whole_model(pl_module.ar)  # of slices on all ranks
        if not writers(trainer):
            return
        if self.tokenizer is None:
            self.tokenizer = SequentialDiffusionTokenizer.from_pretrained(self.path).to(pl_module.device)
        classes = self.classes or list(range(min(pl_module.ar.config.num_classes, 20)))
        labels = torch.tensor(classes, device=pl_module.device).repeat_interleave(self.per_class)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
        with trainer.precision_plugin.val_step_context():
            images = DARPipeline(self.tokenizer, ar).generate(labels, guidance=self.guidance, generator=generators)
        log_picture(trainer, "samples", make_grid(to_uint8(images), nrow=self.per_class))
