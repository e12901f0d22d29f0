"""What lower precision changes: codes, logits and pixels against float32, with trained weights and real photos.

python -m benchmarks.precision [--pipelines fruit64] [--presets v1 B] [--images 64] [--output FILE.json]

"tf32" is a model of what NVIDIA GPUs make of float32 when they are allowed to: the factors of products and convolutions
are rounded to 10 bits of mantissa, here to the nearest, and summed in float32. Fused attention stays exact, as theirs
nearly does.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.clock import filled
from benchmarks.machine import ROOT, describe
from dar_lightning import ARConfig, ARModel, DARPipeline, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.data.transforms import to_float, to_uint8
from dar_lightning.devices import dtype_name
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
    """Rounds the factors of matrix products and convolutions, where the process allows it as for a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        allowed = torch.get_float32_matmul_precision() != "highest"
        if allowed and function in PRODUCTS:  # a bias, third, is added and not multiplied
            args = (*map(round_to_tf32, args[:2]), *args[2:])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def outputs(pipe: DARPipeline, images: Tensor, codes: Tensor, labels: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Codes (B, N) of images, pixels (B, 3, H, W) of given codes, logits (B, N, V) after given codes, batches of 16."""
    found: dict[str, list[Tensor]] = {"codes": [], "pixels": [], "logits": []}
    for some in torch.arange(len(images)).split(16):
        found["codes"].append(pipe.tokenizer.tokenize(images[some]))
        found["pixels"].append(pipe.tokenizer.detokenize(codes[some], noise[some]))
        found["logits"].append(pipe.ar(labels[some], codes[some]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def differences(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Shares that agree, and errors relative to the exact values' norm."""
    likeliest = [found["logits"].argmax(dim=-1) for found in (ours, exact)]
    rounded = [to_uint8(found["pixels"]) for found in (ours, exact)]
    return {
        "codes_agree": (ours["codes"] == exact["codes"]).double().mean().item(),
        "likeliest_token_agrees": (likeliest[0] == likeliest[1]).double().mean().item(),
        "logits_error": ((ours["logits"] - exact["logits"]).norm() / exact["logits"].norm()).item(),
        "pixels_error": ((ours["pixels"] - exact["pixels"]).norm() / exact["pixels"].norm()).item(),
        "pixels_of_8_bits_agree": (rounded[0] == rounded[1]).double().mean().item(),
    }


def compare(pipe: DARPipeline, images: Tensor, labels: Tensor) -> dict:
    """Both precisions against float32, in which the codes that logits and pixels start from are found."""
    stored = dtype_name(pipe.tokenizer.dtype)
    exact_pipe, half = (copy.deepcopy(pipe).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    noise = pipe.tokenizer.draw_noise(len(images), torch.Generator().manual_seed(0))
    codes = exact_pipe.tokenizer.tokenize(images)
    given = (images, codes, labels, noise)
    exact = outputs(exact_pipe, *given)
    torch.set_float32_matmul_precision("high")
    with TF32():
        rounded = outputs(exact_pipe, *given)
    torch.set_float32_matmul_precision("highest")
    found = {"images": len(images), "weights_stored_in": stored}
    return found | {"tf32": differences(rounded, exact), "bfloat16": differences(outputs(half, *given), exact)}


def random_pipeline(tokenizer: str, ar: str) -> DARPipeline:
    """Two presets."""
    torch.manual_seed(0)
    first = filled(SequentialDiffusionTokenizer(TokenizerConfig.preset(tokenizer)))
    return DARPipeline(first.eval(), filled(ARModel(ARConfig.preset(ar))).eval())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", nargs="+", default=["fruit64"], help="of 64x64 pixels and fruit64's classes")
    parser.add_argument(
        "--presets", nargs=2, default=["v1", "B"], help="a tokenizer and an AR model, with random weights"
    )
    parser.add_argument("--images", type=int, default=64, help="validation photos; the presets see a sixteenth of them")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/precision.json")
    arguments = parser.parse_args()
    data = "data/fruit64/val"
    result = {"what": "lower precision against float32", "machine": describe(torch.device("cpu"))}
    result |= {"data": data, "noise_seed": 0, "rows": {}}
    pixels, labels = next(ShardImages(str(ROOT / data), "val", 64).batches(arguments.images))
    images = to_float(pixels)
    for name in arguments.pipelines:
        result["rows"][name] = compare(DARPipeline.from_pretrained(name), images, labels)
    few = max(1, arguments.images // 16)
    random = random_pipeline(*arguments.presets)
    large = F.interpolate(images[:few], size=random.tokenizer.config.image_size, mode="bicubic").clamp(-1, 1)
    name = f"{' and '.join(arguments.presets)}, random weights, enlarged photos"
    result["rows"][name] = compare(random, large, labels[:few])
    print(json.dumps(result["rows"], indent=2))
    write_text(arguments.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
