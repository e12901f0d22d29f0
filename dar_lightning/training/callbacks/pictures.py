"""Image grids in TensorBoard: reconstructions and previews of fixed images, samples of fixed classes or prompts."""

from copy import copy

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.utils import make_grid

from dar_lightning.ar.guidance import Guidance, read_guidance
from dar_lightning.data.transforms import to_uint8
from dar_lightning.errors import require
from dar_lightning.generation.grids import image_grid
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.metrics.reconstruction import finite_psnr, reconstruct, reconstruction_scores
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.training.fsdp import whole_model
from dar_lightning.training.loggers import writers
from dar_lightning.training.module import counted_rows


class Reconstructions(Callback):
    """After each validation, decodes the first images of it and logs PSNR, SSIM, a grid and film strips of previews.

    `groups/val_psnr_after_m` is the PSNR of the preview after m groups: what a further group adds to the picture.

    Args:
        num_images: how many validation images, at most one batch.
        num_strips: how many of them also get a strip: original, then the preview after each group.
    """

    needs = "tokenizer"  # which model

    def __init__(self, num_images: int = 16, num_strips: int = 4):
        self.num_images, self.num_strips = num_images, num_strips

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx or trainer.sanity_checking:
            return
        kept, count = counted_rows(batch["valid"])
        images, numbers = batch["image"][kept][: self.num_images], batch["index"][kept][: self.num_images]
        with trainer.precision_plugin.val_step_context():
            made = reconstruct(pl_module.tokenizer, images, numbers.tolist(), seed=0, previews=True)
        previews, originals = made.decoded, images[:, None]  # (B, K, 3, H, W), (B, 1, 3, H, W)
        psnr = finite_psnr(previews, originals.expand_as(previews)).mean(dim=0)  # (K,)
        scores = {f"val/{name}": each.mean() for name, each in reconstruction_scores(previews[:, -1], images).items()}
        scores |= {f"groups/val_psnr_after_{m}": value for m, value in enumerate(psnr, start=1)}
        pl_module.log_means(scores, min(count, len(images)))
        strips = torch.cat([originals, previews], dim=1)  # (B, 1 + K, 3, H, W)
        for writer in writers(trainer):
            pairs = make_grid(strips[:, [0, -1]].flatten(0, 1), nrow=8)
            writer.add_image("reconstructions", pairs, trainer.global_step)
            shown = make_grid(strips[: self.num_strips].flatten(0, 1), nrow=strips.shape[1])
            writer.add_image("previews", shown, trainer.global_step)


class Samples(Callback):
    """In each validation, draws a grid with a row per class; or per prompt, which is written beside it.

    Args:
        tokenizer: folder or Hub repository of the tokenizer that made the training tokens.
        classes: class indices; None takes all, at most 20.
        per_class: images per class or prompt.
        guidance: scale, (a, b), linear over the tokens, or another schedule as text (`ar.guidance`).
        prompts: for a model that takes text; None takes the first samples of the validation data with their captions,
            at most 8.
    """

    needs = "ar"  # which model

    def __init__(
        self,
        tokenizer: str,
        classes: list[int] | None = None,
        per_class: int = 4,
        guidance: Guidance = 1.0,
        prompts: list[str] | None = None,
    ):
        self.path, self.classes, self.per_class, self.guidance = tokenizer, classes, per_class, read_guidance(guidance)
        self.prompts = prompts
        self.asked: Tensor | None = None  # what the rows show, (rows, ...); None: samples of the validation data
        self.tokenizer: SequentialDiffusionTokenizer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        # What does not fit is found now, not after an epoch.
        pipe = DARPipeline(SequentialDiffusionTokenizer.from_pretrained(self.path), pl_module.ar)
        pipe.guidance_scales(self.guidance)
        condition = copy(pl_module.ar.condition)  # the text encoder that prompts may need goes with the copy
        if self.prompts:
            self.asked = condition.from_prompts(self.prompts)
        elif condition.takes != "prompts":
            self.asked = pipe.condition(self.classes or list(range(min(condition.num_labels, 20))))
            condition.check(self.asked)
        else:
            require(not self.classes, f"Samples: classes is {self.classes}: this model takes prompts")

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        # After the first batch, not at the end of the epoch, when the average may have been taken away.
        if batch_idx or dataloader_idx or trainer.sanity_checking:
            return
        ar = whole_model(pl_module.ar)  # of slices on all ranks
        if not (found := writers(trainer)):
            return
        if self.tokenizer is None:
            self.tokenizer = SequentialDiffusionTokenizer.from_pretrained(self.path).to(pl_module.device)
        pipe, asked, names = DARPipeline(self.tokenizer, ar), self.asked, self.prompts
        if asked is None:  # captions need not be prompts that could be read; their features are there
            texts = batch.get("caption", batch["key"])
            names = list(dict.fromkeys(texts))[:8]
            asked = ar.condition.from_data(batch)[[texts.index(name) for name in names]]
        asked = pipe.condition(asked.repeat_interleave(self.per_class, dim=0))
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(asked))]
        with trainer.precision_plugin.val_step_context():
            images = to_uint8(pipe.generate(asked, guidance=self.guidance, generator=generators))
        if names:
            named = image_grid(images.unflatten(0, (len(names), self.per_class)), names)
            grid = torch.from_numpy(np.array(named)).permute(2, 0, 1)
        else:
            grid = make_grid(images, nrow=self.per_class)
        for writer in found:
            writer.add_image("samples", grid, trainer.global_step)
