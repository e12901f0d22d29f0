"""The network of LPIPS: VGG16 under the published linear heads, frozen."""

import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS, _normalize_tensor

from dar_lightning.errors import UserError, one_line
from dar_lightning.formats.checkpoint import read_checkpoint
from dar_lightning.metrics.features import FrozenNetwork


def lpips_network(weights_path: str | None) -> FrozenNetwork:
    """LPIPS of pairs: two batches (B, 3, H, W) in [-1, 1], H, W >= 32 -> (B,).

    Args:
        weights_path: a file of torchvision's VGG16 (`data/convert_vgg16.py` makes one); None or "download" lets
            torchvision download it.
    """
    from_file = weights_path not in (None, "download")
    try:
        lpips = _LPIPS(net="vgg", pnet_rand=from_file)
    except OSError as error:
        raise UserError(f"VGG16 cannot be downloaded ({one_line(error)}): set weights_path to a file") from error
    if from_file:
        _load(lpips.net, weights_path)
    # channels_last is faster in bf16, on CPUs too
    return FrozenNetwork(_Distance(lpips).to(memory_format=torch.channels_last))


def _load(vgg: nn.Module, path: str) -> None:
    tensors, own = read_checkpoint(path), vgg.state_dict()
    # slice2.5.weight here is features.5.weight in torchvision.
    theirs = {name: tensors.get(f"features.{name.split('.', 1)[1]}") for name in own}
    wrong = [name for name in own if theirs[name] is None or theirs[name].shape != own[name].shape]
    if wrong:
        raise UserError(f"weights_path {path} is no VGG16 of torchvision: {wrong[0]} is missing or misshapen")
    vgg.load_state_dict(theirs)


class _Distance(nn.Module):
    """LPIPS of each pair; unlike torchmetrics' own forward, its differences stay float32 under autocast."""

    def __init__(self, lpips: _LPIPS):
        super().__init__()
        self.scale, self.vgg, self.heads = lpips.scaling_layer, lpips.net, lpips.lins

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        features = [self.vgg(self.scale(images.float())) for images in (first, second)]
        # bfloat16 keeps 8 bits: a difference of features that are nearly equal would have none of them left.
        with torch.autocast(first.device.type, enabled=False):
            distance = torch.zeros(len(first), device=first.device)
            for head, one, other in zip(self.heads, *features, strict=True):  # (B, C, h, w) each
                squares = (_normalize_tensor(one.float()) - _normalize_tensor(other.float())) ** 2
                distance = distance + head(squares).mean(dim=(1, 2, 3))
            return distance
