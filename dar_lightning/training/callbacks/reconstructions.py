"""Reconstructions and previews of fixed images in TensorBoard."""

import torch
from lightning.pytorch import Callback
from torchvision.utils import make_grid

from dar_lightning.data.transforms import to_float, to_uint8
from dar_lightning.metrics.reconstruction import reconstruction_scores
from dar_lightning.training.callbacks.pictures import log_picture, writers
from dar_lightning.training.module import counted_rows


class Reconstructions(Callback):
    """After each validation, decodes the first images of it and logs PSNR, SSIM, a grid and film strips of previews.

    `groups/val_psnr_after_m` is the PSNR of the preview after m groups: what a further group adds to the picture.

    Args:
        num_images: how many validation images, at most one batch.
        num_strips: how many of them also get a strip: original, then the preview after each group.
    """

    def __init__(self, num_images: int = 16, num_strips: int = 4):
        self.num_images, self.num_strips = num_images, num_strips

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx or trainer.sanity_checking:
            return
        tokenizer = pl_module.tokenizer
        kept, count = counted_rows(batch["valid"])
        images = batch["image"][kept][: self.num_images]
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(pl_module.device)
        with trainer.precision_plugin.val_step_context():
            previews = to_uint8(tokenizer.previews(tokenizer.tokenize(to_float(images)), noise))  # (B, K, 3, H, W)
        scores = reconstruction_scores(previews[:, -1], images)
        errors = (previews.float() - images[:, None].float()).square().mean(dim=(2, 3, 4))  # (B, K)
        psnr = (10 * torch.log10(255**2 / errors.clamp(min=1e-9))).mean(dim=0)
        scores = {f"val/{name}": values.mean() for name, values in scores.items()}
        scores |= {f"groups/val_psnr_after_{m}": value for m, value in enumerate(psnr, start=1)}
        pl_module.log_means(scores, min(count, len(images)))
        if writers(trainer):
            pairs = torch.stack([images, previews[:, -1]], dim=1).flatten(0, 1)
            strips = torch.cat([images[:, None], previews], dim=1)[: self.num_strips]
            log_picture(trainer, "reconstructions", make_grid(pairs, nrow=8))
            log_picture(trainer, "previews", make_grid(strips.flatten(0, 1), nrow=strips.shape[1]))
