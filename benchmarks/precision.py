"""What lower precision changes: codes, logits and pixels against float32, with weights and photos that ship.

python -m benchmarks.precision [--images 64] [--output benchmarks/results/precision.json]

"tf32" is what an NVIDIA GPU makes of float32 when it is allowed to: both factors of every product rounded to 10 bits of
mantissa, products and sums in float32. It is computed here by rounding them, on any device.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.clock import filled
from benchmarks.machine import ROOT, describe
from dar_lightning import ARConfig, ARModel, DARPipeline, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.data.transforms import to_float
from dar_lightning.files import write_text
from dar_lightning.metrics.images import ShardImages

PRODUCTS = (F.linear, F.conv2d, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__)


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to the nearest number of 10 bits of mantissa, ties to even; other types as they are."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    bits = bits + 0xFFF + ((bits >> 13) & 1)
    return (bits & ~0x1FFF).view(torch.float32)


class TF32(TorchFunctionMode):
    """Rounds the factors of products, convolutions and attention."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if function in PRODUCTS:  # a bias, third, is added and not multiplied
            args = (*map(round_to_tf32, args[:2]), *args[2:])
        return function(*args, **kwargs)

    @staticmethod
    def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False, **others):
        """Softmax attention by its formula, the attention weights rounded as well."""
        if others or enable_gqa:
            raise NotImplementedError(f"attention with {others}, enable_gqa={enable_gqa}")
        scores = round_to_tf32(q) @ round_to_tf32(k).mT / q.shape[-1] ** 0.5
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        return round_to_tf32(scores.softmax(dim=-1)) @ round_to_tf32(v)


@torch.no_grad()
def outputs(pipe: DARPipeline, images: Tensor, codes: Tensor, labels: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Codes (B, N) of images, pixels (B, 3, H, W) of given codes, logits (B, N, V) after given codes, batches of 16."""
    found: dict[str, list[Tensor]] = {"codes": [], "pixels": [], "logits": []}
    for some in torch.arange(len(images)).split(16):
        found["codes"].append(pipe.tokenizer.tokenize(images[some]))
        found["pixels"].append(pipe.tokenizer.detokenize(codes[some], noise[some]).float())
        found["logits"].append(pipe.ar(labels[some], codes[some]).float())
    return {name: torch.cat(parts) for name, parts in found.items()}


def differences(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Shares that agree, and errors relative to the exact values' norm."""
    likeliest = [found["logits"].argmax(dim=-1) for found in (ours, exact)]
    rounded = [(found["pixels"].clamp(-1, 1) * 127.5).round() for found in (ours, exact)]
    return {
        "codes_agree": (ours["codes"] == exact["codes"]).double().mean().item(),
        "likeliest_token_agrees": (likeliest[0] == likeliest[1]).double().mean().item(),
        "logits_error": ((ours["logits"] - exact["logits"]).norm() / exact["logits"].norm()).item(),
        "pixels_error": ((ours["pixels"] - exact["pixels"]).norm() / exact["pixels"].norm()).item(),
        "pixels_of_8_bits_agree": (rounded[0] == rounded[1]).double().mean().item(),
    }


def compare(pipe: DARPipeline, images: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """Both precisions against float32, in which the codes that logits and pixels start from are found."""
    pipe.ar.eval()
    pipe.tokenizer.eval()
    noise = pipe.tokenizer.draw_noise(len(images), torch.Generator().manual_seed(0))
    codes = pipe.tokenizer.tokenize(images)
    exact = outputs(pipe, images, codes, labels, noise)
    with TF32():
        found = {"tf32": differences(outputs(pipe, images, codes, labels, noise), exact)}
    pipe.to(torch.bfloat16)
    return found | {"bfloat16": differences(outputs(pipe, images, codes, labels, noise), exact)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="photos for fruit64; v1 and B see a sixteenth of them")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/precision.json")
    arguments = parser.parse_args()
    result = {"what": "lower precision against float32", "machine": describe(torch.device("cpu")), "rows": {}}

    pixels, labels = next(ShardImages(str(ROOT / "data/fruit64/val"), "val", 64).batches(arguments.images))
    images = to_float(pixels)
    shipped = DARPipeline.from_pretrained("fruit64").to(torch.float32)
    result["rows"]["fruit64, shipped weights"] = compare(shipped, images, labels)
    torch.manual_seed(0)
    random = DARPipeline(
        filled(SequentialDiffusionTokenizer(TokenizerConfig.preset("v1"))), filled(ARModel(ARConfig.preset("B")))
    )
    few = max(1, arguments.images // 16)
    large = F.interpolate(images[:few], size=256, mode="bicubic").clamp(-1, 1)
    result["rows"]["v1 and B, random weights"] = compare(random, large, labels[:few])
    print(json.dumps(result["rows"], indent=2))
    write_text(arguments.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
