"""REPA: the decoder's hidden patches point where a frozen DINOv2's do (paper, section 3.1; arXiv 2410.06940)."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from dar_lightning.checkpoint import read_checkpoint
from dar_lightning.errors import UserError
from dar_lightning.losses.frozen import FrozenNetwork
from dar_lightning.losses.weighting import WeightedLoss
from dar_lightning.pretrained import one_line
from dar_lightning.tokenizer.decoder import REPA_DIM

TEACHER_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RepaLoss(WeightedLoss):
    """1 - cosine similarity of projected hidden patches and a teacher's patch tokens.

    Under bf16-mixed the teacher runs in bfloat16 (its norms and softmax in float32); the similarity is in float32.

    Args:
        weight: factor of this loss (paper: 0.5).
        model: timm's name of the teacher, a ViT of width 768; the paper's is DINOv2 ViT-B/14.
        weights_path: a file of its weights, in timm's names; None lets timm download them.
        t_power: see WeightedLoss.
        start_step: optimizer steps without this loss.

    Raises:
        UserError: if the teacher does not exist, has another width, or its weights cannot be had; or if an option is
            out of range.
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
            vit = timm.create_model(model, pretrained=weights_path is None, img_size=TEACHER_SIZE, num_classes=0)
        except (OSError, RuntimeError, TypeError) as error:
            raise UserError(f"teacher {model} cannot be had ({one_line(error)}): set weights_path") from error
        if vit.num_features != REPA_DIM:
            raise UserError(f"teacher {model} has width {vit.num_features}: REPA needs {REPA_DIM}")
        if weights_path is not None:
            try:
                vit.load_state_dict(read_checkpoint(weights_path))
            except RuntimeError as error:
                raise UserError(f"weights_path {weights_path} does not fit {model}: {one_line(error)}") from error
        self.grid = vit.patch_embed.grid_size
        self.teacher = FrozenNetwork(_Patches(vit))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Teacher's patch tokens after its final norm: (B, 3, H, W) in [-1, 1] -> (B, rows * columns, 768)."""
        x = F.interpolate(images.float(), size=(TEACHER_SIZE, TEACHER_SIZE), mode="bicubic", antialias=False)
        mean, std = (x.new_tensor(value).view(1, 3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
        return self.teacher(((x + 1) / 2 - mean) / std)

    def __call__(self, projected: Tensor, images: Tensor, t: Tensor) -> Tensor:
        """Mean of t^t_power (1 - cosine similarity) between projected (B, P, 768) and the teacher's P patches.

        Args:
            projected: hidden patches in the teacher's width, on its grid.
            images: (B, 3, H, W) in [-1, 1].
            t: flow times (B,).

        Returns:
            A scalar, not yet multiplied by `weight`.
        """
        similarity = F.cosine_similarity(self.features(images).float(), projected.float(), dim=-1)  # (B, P)
        return self.mean(1 - similarity.mean(dim=1), t)


class _Patches(torch.nn.Module):
    def __init__(self, vit: torch.nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        return self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]
