"""REPA: the decoder's hidden patches point where a frozen DINOv2's do (paper, section 3.1; arXiv 2410.06940)."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.errors import UserError, one_line, require
from dar_lightning.formats.checkpoint import read_checkpoint
from dar_lightning.metrics.features import FrozenNetwork
from dar_lightning.tokenizer.decoder import REPA_DIM
from dar_lightning.training.losses.weighting import WeightedLoss

TEACHER_SIZE = 224
TABLE_OFFSET = 0.1  # DINOv2's: it scales its position table by (16 + 0.1) / 37 where 16 rows are needed of 37
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RepaLoss(WeightedLoss):
    """1 - cosine similarity of projected hidden patches and a teacher's patch tokens.

    Under bf16-mixed the teacher runs in bfloat16 (its norms and softmax in float32); the similarity is in float32.

    Args:
        weight: factor of this loss (paper: 0.5).
        model: timm's name of the teacher, a ViT of width 768; the paper's is DINOv2 ViT-B/14.
        weights_path: a file of its weights as timm released them (DINOv2's are of 518 pixels); None lets timm
            download them.
        t_power: see WeightedLoss.
        start_step: optimizer steps without this loss.
    """

    def __init__(
        self,
        weight: float = 0.5,
        model: str = "vit_base_patch14_dinov2.lvd142m",
        weights_path: str | None = None,
        t_power: float = 0.0,
        start_step: int = 0,
    ):
        super().__init__(weight, t_power, start_step)
        try:
            vit = timm.create_model(model, pretrained=weights_path is None, num_classes=0)  # of its own image size
        except (OSError, RuntimeError, TypeError) as error:
            raise UserError(f"teacher {model} cannot be had ({one_line(error)}): set weights_path") from error
        require(vit.num_features == REPA_DIM, f"teacher {model} has width {vit.num_features}: REPA needs {REPA_DIM}")
        if weights_path is not None:
            try:
                vit.load_state_dict(read_checkpoint(weights_path))
            except RuntimeError as error:
                raise UserError(f"weights_path {weights_path} does not fit {model}: {one_line(error)}") from error
        resize_positions(vit, TEACHER_SIZE)
        self.grid = vit.patch_embed.grid_size
        self.teacher = FrozenNetwork(_Patches(vit))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Teacher's patch tokens after its final norm: (B, 3, H, W) in [-1, 1] -> (B, rows * columns, 768)."""
        return self.teacher(images.float())

    def __call__(self, projected: Tensor, images: Tensor, t: Tensor) -> Tensor:
        """Mean of t^t_power (1 - cosine similarity) of projected (B, P, 768) and the teacher's, without `weight`.

        Images are (B, 3, H, W) in [-1, 1], flow times (B,).
        """
        similarity = F.cosine_similarity(self.features(images).float(), projected.float(), dim=-1)  # (B, P)
        return self.mean(1 - similarity.mean(dim=1), t)


def resize_positions(vit: nn.Module, size: int) -> None:
    """Fit a timm ViT and its position table to images of another size, as DINOv2 does; in place.

    timm would resample the table with antialiasing and without DINOv2's offset.
    """
    table, old = vit.pos_embed, vit.patch_embed.grid_size
    vit.set_input_size(img_size=(size, size))
    new = vit.patch_embed.grid_size
    if table is None or new == old:  # None: RoPE alone
        return
    first, patches = table.detach().tensor_split([table.shape[1] - old[0] * old[1]], dim=1)  # class token and the like
    patches = patches.unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    scale = tuple((side + TABLE_OFFSET) / before for side, before in zip(new, old, strict=True))
    patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=False)
    vit.pos_embed.data = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)


class _Patches(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> a ViT's patch tokens (B, P, D), at TEACHER_SIZE and ImageNet's mean and std."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit
        for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):  # buffers: on the device once
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = ((images + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, size=(TEACHER_SIZE, TEACHER_SIZE), mode="bicubic", antialias=False)
        return self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]
