"""What lower precision changes: codes, logits and pixels against float32, with trained weights and real photos.

python -m benchmarks.precision [--pipelines fruit64] [--presets v1 B] [--images 64] [--output FILE.json]

"tf32" is a model of what NVIDIA GPUs make of float32 when they are allowed to: the factors of products and convolutions
are rounded to 10 bits of mantissa, here to the nearest, and summed in float32. Fused attention stays exact, as theirs
nearly does.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.clock import filled
from benchmarks.machine import RESULTS, ROOT, options, record
from dar_lightning import ARConfig, ARModel, DARPipeline, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.data.transforms import to_float, to_uint8
from dar_lightning.devices import dtype_name
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
def outputs(pipe: DARPipeline, images: Tensor, codes: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """Codes (B, N) of images, logits (B, N, V) after given codes, pixels (B, 3, H, W) of given codes; batches of 16."""
    found = []
    for some in torch.arange(len(images)).split(16):
        pixels = pipe.tokenizer.detokenize(codes[some], noise[some])
        found.append((pipe.tokenizer.tokenize(images[some]), pipe.ar(labels[some], codes[some]), pixels))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def differences(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Shares that agree, and errors relative to the exact values' norm."""
    (codes, logits, pixels), (exact_codes, exact_logits, exact_pixels) = ours, exact
    return {
        "codes_agree": (codes == exact_codes).double().mean().item(),
        "likeliest_token_agrees": (logits.argmax(dim=-1) == exact_logits.argmax(dim=-1)).double().mean().item(),
        "logits_error": ((logits - exact_logits).norm() / exact_logits.norm()).item(),
        "pixels_error": ((pixels - exact_pixels).norm() / exact_pixels.norm()).item(),
        "pixels_of_8_bits_agree": (to_uint8(pixels) == to_uint8(exact_pixels)).double().mean().item(),
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


def rows(pipelines: list[str], presets: list[str], images: Tensor, labels: Tensor) -> Iterator[dict]:
    """Of trained pipelines, and of two presets with random weights, which are slow: of fewer images, enlarged."""
    for name in pipelines:
        yield {"models": name} | compare(DARPipeline.from_pretrained(name), images, labels)
    torch.manual_seed(0)
    tokenizer = SequentialDiffusionTokenizer(TokenizerConfig.preset(presets[0]))
    pipe = DARPipeline(*(filled(model).eval() for model in (tokenizer, ARModel(ARConfig.preset(presets[1])))))
    few = max(1, len(images) // 16)
    large = F.interpolate(images[:few], size=tokenizer.config.image_size, mode="bicubic").clamp(-1, 1)
    name = f"{' and '.join(presets)}, random weights, enlarged photos"
    yield {"models": name} | compare(pipe, large, labels[:few])


if __name__ == "__main__":
    given = options(__doc__, pipelines=["fruit64"], presets=["v1", "B"], images=64, output=RESULTS / "precision.json")
    data = "data/fruit64/val"
    pixels, labels = next(ShardImages(str(ROOT / data), "val", 64).batches(given.images))
    found = rows(given.pipelines, given.presets, to_float(pixels), labels)
    record(given.output, "lower precision against float32", found, data=data, noise_seed=0)
