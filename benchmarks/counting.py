"""FLOPs of a call, counted on tensors that have a shape and no values: full size costs seconds and no memory."""

from collections.abc import Callable
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.tokenizer.conditioner import Conditioner
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.decoder import PixelDecoder
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

REPA_GRID = (16, 16)  # of DINOv2 ViT-B/14 at 224 pixels


def count(make: Callable[[], Callable[[], object]], real_networks: bool = False) -> int:
    """Operations in matrix products, convolutions and attention; a multiplication and an addition are two.

    Attention is computed by its plain formula, made of products: fused kernels count differently by device, as their
    backward passes compute the attention map again. Causal attention counts in full, see `causal_half`.

    Args:
        make: builds what the call needs, tensors and models, and returns the call.
        real_networks: let tensors with values take part (the frozen networks of losses).
    """
    counter = FlopCounterMode(display=False)
    shapes = FakeTensorMode(allow_non_fake_inputs=real_networks)
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), shapes:
        call = make()
        with counter:
            call()
    return counter.get_total_flops()


def causal_half(config: ARConfig, passes: int = 3) -> int:
    """Of an AR model's operations over one sequence, those above the causal diagonal, which fused attention skips.

    Args:
        config: the model's.
        passes: 3 for a training step, whose backward pass is two; 1 for the forward pass alone.
    """
    return passes * config.depth * 2 * config.num_tokens**2 * config.dim


@cache
def encode(config: TokenizerConfig) -> int:
    """Image -> tokens, of one image."""

    def make():
        model = SequentialDiffusionTokenizer(config).requires_grad_(False)
        images = torch.empty(1, 3, config.image_size, config.image_size)
        return lambda: model.tokenize(images)

    return count(make)


@cache
def condition(config: TokenizerConfig) -> int:
    """All tokens -> conditioning vectors, of one image."""

    def make():
        model = Conditioner(config).requires_grad_(False)
        latents = torch.empty(1, config.num_tokens, config.codebook_dim)
        return lambda: model(latents)

    return count(make)


@cache
def diffusion_step(config: TokenizerConfig) -> int:
    """One call of the pixel decoder, on one image."""

    def make():
        model = PixelDecoder(config).requires_grad_(False)
        x, t = torch.empty(1, 3, config.image_size, config.image_size), torch.empty(1)
        cond = torch.empty(1, config.window, config.conditioner_dim)
        return lambda: model(x, t, cond)

    return count(make)


def decode(config: TokenizerConfig) -> int:
    """Tokens -> image, or all K previews, which are of the same trajectory."""
    return condition(config) + config.num_groups * diffusion_step(config)


@cache
def tokenizer_step(config: TokenizerConfig, recompute: tuple[str, ...] = ()) -> int:
    """Forward and backward pass of one image, REPA's head included, the frozen networks not.

    Args:
        config: the tokenizer's.
        recompute: parts with activation checkpointing, of which torch does not recompute what nothing needs.
    """

    def make():
        model = SequentialDiffusionTokenizer(config)
        for part in recompute:
            model.get_submodule(part).recompute = True
        images = torch.empty(1, 3, config.image_size, config.image_size)

        def call():
            losses = model.training_losses(images)
            loss = losses["flow"] + losses["vq"] + losses["commit"]
            if "hidden" in losses:
                loss = loss + model.decoder.project_hidden(losses["hidden"], REPA_GRID).mean()
            loss.backward()

        return call

    return count(make)


@cache
def ar_step(config: ARConfig) -> int:
    """Forward and backward pass of one sequence; see `causal_half`."""

    def make():
        model = ARModel(config)
        labels, codes = torch.zeros(1, dtype=torch.long), torch.zeros(1, config.num_tokens, dtype=torch.long)
        return lambda: model(labels, codes).mean().backward()

    return count(make)


@cache
def ar_token(config: ARConfig, position: int) -> int:
    """One token of one sequence, with this many positions in the cache before it."""

    def make():
        model = ARModel(config).requires_grad_(False).eval()
        tokens = torch.zeros(1, dtype=torch.long)
        _, cache = model.start(tokens, torch.zeros(1, 0, dtype=torch.long))
        cache.length = position
        return lambda: model.step(tokens, cache)

    return count(make)


def ar_tokens(config: ARConfig, tokens: int, guided: bool) -> float:
    """The first tokens of one image. A token's work grows linearly with its position."""
    sequences = 2 if guided else 1
    return sequences * tokens * (ar_token(config, 0) + ar_token(config, tokens - 1)) / 2
