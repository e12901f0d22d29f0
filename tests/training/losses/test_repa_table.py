"""REPA's teacher from DINOv2's weights as timm released them, of 518 pixels, against a position table by hand.

The weights are random and of one block, in the real model's layout.
"""

import numpy as np
import timm
import torch
import torch.nn.functional as F

from dar_lightning.training.losses import RepaLoss

NAME = "vit_base_patch14_dinov2.lvd142m"


def cubic(x: float, a: float = -0.75) -> float:
    """The cubic kernel of bicubic interpolation."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resampling(old: int, new: int, scale: float) -> np.ndarray:
    """(new, old) weights of output i, which looks at (i + 0.5) / scale - 0.5 without antialiasing."""
    weights = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) / scale - 0.5
        for place in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, np.clip(place, 0, old - 1)] += cubic(at - place)
    return weights


def test_the_table_is_resampled_as_dinov2_does(monkeypatch, tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model(NAME, pretrained=False, num_classes=0, depth=1)
    vit.blocks[0].ls1.gamma.data.fill_(1.0)
    smooth = F.interpolate(torch.randn(1, 768, 5, 5), size=37, mode="bicubic")  # neighbours are alike, as if trained
    vit.pos_embed.data[:, 1:] = smooth.flatten(2).transpose(1, 2)
    torch.save(vit.state_dict(), tmp_path / "model.pth")
    table = vit.pos_embed.detach()[0]  # (1 + 37 * 37, 768), the class token's row first
    create = timm.create_model  # what it would download is the file
    overlay = {"depth": 1, "pretrained_cfg_overlay": {"file": str(tmp_path / "model.pth")}}
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: create(*names, **options | overlay))

    loss, downloaded = RepaLoss(weights_path=str(tmp_path / "model.pth")), RepaLoss()
    assert loss.grid == (16, 16)
    axis = resampling(37, 16, 16.1 / 37)
    by_hand = np.einsum("ia,jb,abd->ijd", axis, axis, table[1:].double().numpy().reshape(37, 37, 768))
    by_hand = torch.cat([table[:1], torch.from_numpy(by_hand).flatten(0, 1).float()])
    for each in (loss, downloaded):
        torch.testing.assert_close(each.teacher.network.vit.pos_embed[0], by_hand, atol=1e-5, rtol=1e-4)

    timms = timm.create_model(NAME, pretrained=True, num_classes=0, img_size=224).eval()
    assert (timms.pos_embed[0] - by_hand)[1:].norm() > 0.01 * by_hand[1:].norm(), "timm's own table"
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    seen = F.interpolate((images / 2 + 0.5 - mean) / std, size=224, mode="bicubic")
    with torch.no_grad():
        with_timms = timms.forward_features(seen)[:, 1:]
        timms.pos_embed.data[0] = by_hand
        expected = timms.forward_features(seen)[:, 1:]
    torch.testing.assert_close(loss.features(images), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(with_timms, expected, atol=1e-4, rtol=1e-4)
