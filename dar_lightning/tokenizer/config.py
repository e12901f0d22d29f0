"""Hyperparameters of the sequential diffusion tokenizer: plain numbers, checked once, with the paper's presets."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from dar_lightning.errors import MOST_BLOCKS, check_range, require
from dar_lightning.formats.registry import check_plain

# Rows of the query and position tables. More than num_tokens, so that official weights fit any token count.
TABLE_ROWS = 1024

PARTS = ("encoder", "conditioner", "decoder")
# Hyperparameters that must be at least 1.
POSITIVE = ("image_size", "encoder_patch_size", "decoder_patch_size", "head_dim", "codebook_size", "codebook_dim")
POSITIVE += ("num_tokens", "num_groups", *(f"{part}_{what}" for part in PARTS for what in ("dim", "depth")))
# Hyperparameters of which the first must be a multiple of the second.
MULTIPLES = [("num_tokens", "num_groups"), ("image_size", "encoder_patch_size"), ("image_size", "decoder_patch_size")]
MULTIPLES += [(f"{part}_dim", "head_dim") for part in PARTS]

# What decides the tokens of an image, beside the weights.
TOKEN_FIELDS = ("encoder_patch_size", "encoder_dim", "encoder_depth", "head_dim", "low_rank_queries", "num_tokens")
TOKEN_FIELDS += ("absolute_positions", "latent_norm", "quantizer", "quantizer_options")
TOKEN_FIELDS += ("codebook_size", "codebook_dim")


@dataclass(frozen=True)
class TokenizerConfig:
    """Sequential diffusion tokenizer (section 3.1 of the paper; the defaults are the released v1, 300M).

    Args:
        image_size: side of the (square) training images, in pixels. Other sizes work at run time.
        encoder_patch_size: side of the encoder's patches.
        encoder_dim: width of the encoder.
        encoder_depth: number of encoder blocks.
        conditioner_dim: width of the causal token decoder and of the conditioning vectors.
        conditioner_depth: number of its blocks.
        codebook_size: number of codes.
        codebook_dim: channels of a code.
        num_tokens: N, tokens per image (at most 1024).
        num_groups: K, groups that the tokens are read in, and default number of diffusion steps.
        tokens_per_step: n, consecutive tokens that one diffusion step reads; None is N / K.
        low_rank_queries: store the encoder's queries as a rank-8 product, as v1 does, instead of a full table.
        decoder_dim: width of the pixel diffusion transformer.
        decoder_depth: number of its blocks.
        decoder_patch_size: side of its patches.
        data_std: factor on images in flow matching.
        time_shift: beta of t = u / (u + beta (1 - u)).
        repa_layer: index, from 0, of the decoder block before which REPA reads the hidden state; None builds no head.
        head_dim: channels of an attention head, everywhere.
        group_rounding: which group trains at uniform time u: "round" (official code) or "ceil" (paper).
        absolute_positions: add fixed sine-cosine positions to the patches of encoder and decoder, beside RoPE. Official
            models have RoPE alone, which tells a noisy patch where it is only once its queries are trained.
        prediction: what the decoder's network puts out: "velocity" (official), or "image", an estimate of the scaled
            image, on which the loss is taken and from which sampling computes the velocity. Noise fills all channels of
            a patch, images do not, so a decoder narrower than its patches, 3 * decoder_patch_size^2 channels, can only
            learn "image" (arXiv 2511.13720).
        latent_norm: "none" (official), or "batch": batch normalisation of the encoder's output, without parameters.
            Without it an untrained decoder, which ignores the tokens, lets the encoder collapse in short runs.
        quantizer: "vq" (the paper), "fsq", "lfq", "bsq", "ibq" or "simvq" (tokenizer.quantizers), or the class path of
            your own, registered by `register_quantizer`. "lfq" and "bsq" need a codebook_size of 2 to the power of
            codebook_dim.
        quantizer_options: arguments of its class beside the two sizes: numbers, words, and lists of them.
    """

    # Names in files of older versions, and what to do with them in a training config. They say nothing of a trained
    # model: files of weights are read without them.
    REMOVED: ClassVar[dict[str, str]] = {
        "gate_init": "gone, leave it out",
        "modulation_init_std": "now model.init_args.init.modulation_std",
        "position_init_std": "gone, leave it out",
        "input_init_scale": "gone, leave it out",
    }

    image_size: int = 256
    encoder_patch_size: int = 16
    encoder_dim: int = 768
    encoder_depth: int = 8
    conditioner_dim: int = 768
    conditioner_depth: int = 8
    codebook_size: int = 16384
    codebook_dim: int = 8
    num_tokens: int = 256
    num_groups: int = 8
    tokens_per_step: int | None = None
    low_rank_queries: bool = True
    decoder_dim: int = 768
    decoder_depth: int = 12
    decoder_patch_size: int = 8
    data_std: float = 0.6
    time_shift: float = 2.0
    repa_layer: int | None = 8
    head_dim: int = 64
    group_rounding: Literal["round", "ceil"] = "round"
    absolute_positions: bool = False
    prediction: Literal["velocity", "image"] = "velocity"
    latent_norm: Literal["none", "batch"] = "none"
    quantizer: str = "vq"
    quantizer_options: dict = field(default_factory=dict, hash=False)

    def __post_init__(self):
        for name in POSITIVE:
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        depths = {name: getattr(self, name) for name in ("encoder_depth", "conditioner_depth", "decoder_depth")}
        check_range(1, MOST_BLOCKS, **depths)
        for name in ("data_std", "time_shift"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} is {value}: it must be positive and finite")
        for name in ("group_rounding", "prediction", "latent_norm"):
            value, choices = getattr(self, name), get_args(type(self).__annotations__[name])
            require(value in choices, f"{name} is {value!r}: it must be {' or '.join(map(repr, choices))}")
        tokens = self.num_tokens
        require(tokens <= TABLE_ROWS, f"num_tokens is {tokens}: it must be at most {TABLE_ROWS}")
        for name, divisor in MULTIPLES:
            value, by = getattr(self, name), getattr(self, divisor)
            require(value % by == 0, f"{name} {value} is not a multiple of {divisor} {by}")
        window = self.window
        require(1 <= window <= tokens, f"tokens_per_step is {window}: it must be from 1 to num_tokens, {tokens}")
        require(self.head_dim % 4 == 0, f"head_dim is {self.head_dim}: 2-D RoPE needs a multiple of 4")
        layer, last = self.repa_layer, self.decoder_depth - 1
        require(layer is None or 0 <= layer <= last, f"repa_layer is {layer}: it must be from 0 to {last}, or null")
        check_plain(self.quantizer_options, "quantizer")

    @property
    def window(self) -> int:
        """Tokens that one diffusion step reads: tokens_per_step, or N / K."""
        return self.num_tokens // self.num_groups if self.tokens_per_step is None else self.tokens_per_step

    @classmethod
    def preset(cls, name: str) -> "TokenizerConfig":
        """A named configuration: "v1" (released, 300M), "light" (the paper's ablations, 113M) or "tiny" (tests)."""
        require(name in PRESETS, f"unknown tokenizer preset {name!r}: choose from {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, as config.json and checkpoints keep them."""
        return asdict(self)


PRESETS: dict[str, dict[str, Any]] = {
    "v1": {},
    "light": dict(encoder_dim=512, conditioner_dim=512, decoder_dim=512, decoder_depth=8, repa_layer=5),
    "tiny": dict(image_size=64, codebook_size=64, num_tokens=32, num_groups=4, repa_layer=None)
    | {f"{part}_{what}": size for part in PARTS for what, size in (("dim", 64), ("depth", 2))},
}
