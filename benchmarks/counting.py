"""FLOPs of a call, counted on tensors that have a shape and no values: full size costs seconds and no memory."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dar_lightning import ARConfig, ARModel, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.tokenizer.conditioner import Conditioner
from dar_lightning.tokenizer.decoder import PixelDecoder

REPA_GRID = (16, 16)  # of DINOv2 ViT-B/14 at 224 pixels


def counted(make: Callable[..., Callable[[], object]]) -> Callable[..., int]:
    """A function that builds models and tensors and returns a call -> one that counts the call's operations.

    Those in matrix products, convolutions and attention; a multiplication and an addition are two. Attention is
    computed by its plain formula, made of products: fused kernels count differently by device, as their backward passes
    compute the attention map again. Causal attention counts in full, see `causal_half`.
    """

    @cache
    def count(*arguments, **options) -> int:
        counter = FlopCounterMode(display=False)
        with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), FakeTensorMode():
            call = make(*arguments, **options)
            with counter:
                call()
        return counter.get_total_flops()

    return count


def causal_half(config: ARConfig) -> int:
    """Of an AR model's operations in a training step of one sequence, those above the causal diagonal.

    Fused attention skips them, in the forward pass and in the backward pass, which is two.
    """
    return 3 * config.depth * 2 * config.num_tokens**2 * config.dim


def empty_image(config: TokenizerConfig) -> Tensor:
    """(1, 3, H, W)"""
    return torch.empty(1, 3, config.image_size, config.image_size)


@counted
def encode(config: TokenizerConfig):
    """Image -> tokens, of one image."""
    model, image = SequentialDiffusionTokenizer(config).requires_grad_(False), empty_image(config)
    return lambda: model.tokenize(image)


@counted
def condition(config: TokenizerConfig):
    """All tokens -> conditioning vectors, of one image."""
    model = Conditioner(config).requires_grad_(False)
    latents = torch.empty(1, config.num_tokens, config.codebook_dim)
    return lambda: model(latents)


@counted
def diffusion_step(config: TokenizerConfig):
    """One call of the pixel decoder, on one image."""
    model, image = PixelDecoder(config).requires_grad_(False), empty_image(config)
    t, cond = torch.empty(1), torch.empty(1, config.window, config.conditioner_dim)
    return lambda: model(image, t, cond)


def decode(config: TokenizerConfig) -> int:
    """Tokens -> image, or all K previews, which are of the same trajectory."""
    return condition(config) + config.num_groups * diffusion_step(config)


def tokenizer_loss(model: SequentialDiffusionTokenizer, images: Tensor, *drawn: Tensor) -> Tensor:
    """Of a training step, REPA's head included, the frozen networks not; `drawn` are times and noise."""
    losses = model.training_losses(images, *drawn)
    loss = losses["flow"] + losses["vq"] + losses["commit"]
    if "hidden" in losses:
        loss = loss + model.decoder.project_hidden(losses["hidden"], REPA_GRID).mean()
    return loss


@counted
def tokenizer_step(config: TokenizerConfig, recompute: bool = False):
    """Forward and backward pass of one image, perhaps with activation checkpointing in the pixel decoder."""
    model, image = SequentialDiffusionTokenizer(config), empty_image(config)
    model.decoder.recompute = recompute
    return lambda: tokenizer_loss(model, image).backward()


@counted
def ar_step(config: ARConfig):
    """Forward and backward pass of one sequence; see `causal_half`."""
    model = ARModel(config)
    labels, codes = torch.zeros(1, dtype=torch.long), torch.zeros(1, config.num_tokens, dtype=torch.long)
    return lambda: model(labels, codes).mean().backward()


@counted
def ar_token(config: ARConfig, position: int):
    """One token of one sequence, with this many positions in the cache before it."""
    model = ARModel(config).requires_grad_(False).eval()
    tokens = torch.zeros(1, dtype=torch.long)
    _, cache = model.start(tokens, torch.zeros(1, 0, dtype=torch.long))
    cache.length = position
    return lambda: model.step(tokens, cache)


def ar_tokens(config: ARConfig, tokens: int, guided: bool) -> float:
    """The first tokens of one image. A token's work grows linearly with its position."""
    sequences = 2 if guided else 1
    return sequences * tokens * (ar_token(config, 0) + ar_token(config, tokens - 1)) / 2
