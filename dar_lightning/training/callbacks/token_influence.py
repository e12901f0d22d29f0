"""Monitor of token influence: PSNRs between decodings with exchanged tokens and noise."""

import torch
from lightning.pytorch import Callback

from dar_lightning.data.transforms import to_float
from dar_lightning.errors import UserError
from dar_lightning.generation.drawing import image_generator
from dar_lightning.metrics.binned import BinnedMean
from dar_lightning.metrics.token_influence import token_influence, token_influence_names


class TokenInfluence(Callback):
    """In each validation, logs how much tokens decide of the first images: PSNRs in dB, means over all devices' images.

    - `val/psnr_own_tokens`, `val/psnr_other_tokens`: images against their decodings from their own tokens, and from
      those of the next image.
    - `val/psnr_same_tokens`: two decodings of the same tokens from different noise. High: the tokens decide.
    - `val/psnr_exchanged_from_group_m`: two decodings from the same noise, one with the next image's tokens from group
      m (from 1) on; of the first, the second, and the first of the later half. Low: these tokens decide.

    Not measured while the codebook is bypassed.

    Args:
        num_images: how many of each device's first validation batch; each is decoded up to five times.
    """

    def __init__(self, num_images: int = 16):
        if num_images < 2:
            raise UserError(f"TokenInfluence: num_images is {num_images}: another image's tokens need 2 or more")
        self.num_images = num_images

    def setup(self, trainer, pl_module, stage) -> None:
        self._names = token_influence_names(pl_module.tokenizer.config.num_groups)
        self._mean = BinnedMean(len(self._names))

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self._mean.to(pl_module.device).reset()

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx or dataloader_idx or trainer.sanity_checking:
            return
        tokenizer, valid = pl_module.tokenizer, batch["valid"]
        images, numbers = batch["image"][valid][: self.num_images], batch["index"][valid][: self.num_images]
        if len(images) < 2 or tokenizer.quantizer.bypass:
            return
        generators = [image_generator(0, number) for number in numbers.tolist()]
        with trainer.precision_plugin.val_step_context():
            codes = tokenizer.tokenize(to_float(images))
            psnr = token_influence(tokenizer, images, codes, codes.roll(-1, dims=0), generators)
        self._mean.update(torch.arange(len(self._names), device=psnr.device).expand_as(psnr), psnr)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        means = self._mean.compute().cpu()  # on all ranks, also those that measured nothing
        pl_module.log_dict(
            {f"val/{name}": mean for name, mean in zip(self._names, means, strict=True) if mean.isfinite()}
        )
