"""Initial weights of the tokenizer: the official rule for every parameter, in one place."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from dar_lightning.errors import require


@dataclass(frozen=True)
class TokenizerInit:
    """How training of a tokenizer starts, where that differs from D-AR; the defaults are D-AR's.

    Args:
        modulation_std: spread of the modulation layers' weights. 0 (official) starts without conditioning.

    Raises:
        UserError: for a value that is not finite, or negative.
    """

    modulation_std: float = 0.0

    def __post_init__(self):
        std = self.modulation_std
        require(0 <= std < math.inf, f"init.modulation_std is {std}: it must be a finite number, 0 or more")


@torch.no_grad()
def init_weights(tokenizer: nn.Module, init: TokenizerInit = TokenizerInit()) -> None:
    """Fill a new SequentialDiffusionTokenizer's weights as D-AR's training starts.

    Inside transformer blocks every linear layer starts from N(0, 0.02), whatever its width, with biases of 0; residual
    gates, the modulation layer and the decoder's last convolution start at 0. Tables start from N(0, 0.02), low-rank
    queries from a standard normal distribution cut at -2 and 2. All other layers keep torch's default, uniform within
    1 / sqrt(fan_in); norms start at 1 and 0; the codebook's start is its quantizer's.
    """
    encoder, conditioner, decoder = tokenizer.encoder, tokenizer.conditioner, tokenizer.decoder
    for blocks in (encoder.blocks, conditioner.blocks, decoder.blocks):
        for layer in blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
    zeros = [gate for block in (*encoder.blocks, *conditioner.blocks) for gate in (block.gate1, block.gate2)]
    for parameter in (*zeros, decoder.conv_out.weight, decoder.conv_out.bias):
        nn.init.zeros_(parameter)
    for block in decoder.blocks:
        nn.init.normal_(block.modulation.weight, std=init.modulation_std)  # a std of 0 gives zeros
    if tokenizer.config.low_rank_queries:
        # By the inverse of the distribution function: nn.init.trunc_normal_ reads values, which fake tensors have not.
        mass = math.erf(2 / math.sqrt(2))  # of a normal distribution within 2 spreads
        encoder.queries.weight.uniform_(-mass, mass).erfinv_().mul_(math.sqrt(2)).clamp_(-2.0, 2.0)
    else:
        nn.init.normal_(encoder.queries.weight, std=0.02)
    nn.init.normal_(conditioner.positions.weight, std=0.02)
