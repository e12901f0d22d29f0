"""Quantizers by name: latents to codes and back. Classes of your own by class path; a config alone imports no code."""

from typing import Any

from torch import nn

from dar_lightning.formats.registry import Registry
from dar_lightning.tokenizer.quantizers.fsq import FiniteScalarQuantizer
from dar_lightning.tokenizer.quantizers.ibq import IndexBackpropagationQuantizer
from dar_lightning.tokenizer.quantizers.interface import Quantized, Quantizer
from dar_lightning.tokenizer.quantizers.lfq import BinarySphericalQuantizer, LookupFreeQuantizer
from dar_lightning.tokenizer.quantizers.simvq import SimVectorQuantizer
from dar_lightning.tokenizer.quantizers.vector import VectorQuantizer

__all__ = [
    "BinarySphericalQuantizer",
    "FiniteScalarQuantizer",
    "IndexBackpropagationQuantizer",
    "LookupFreeQuantizer",
    "Quantized",
    "Quantizer",
    "SimVectorQuantizer",
    "VectorQuantizer",
    "import_quantizer",
    "make_quantizer",
    "register_quantizer",
]

QUANTIZERS = Registry(
    "quantizer",
    {  # by name in TokenizerConfig.quantizer
        "vq": VectorQuantizer,
        "fsq": FiniteScalarQuantizer,
        "lfq": LookupFreeQuantizer,
        "bsq": BinarySphericalQuantizer,
        "ibq": IndexBackpropagationQuantizer,
        "simvq": SimVectorQuantizer,
    },
    needs=("nearest", "lookup", "bypass"),
)
register_quantizer, import_quantizer = QUANTIZERS.register, QUANTIZERS.import_class


def make_quantizer(name: str, codebook_size: int, codebook_dim: int, options: dict[str, Any]) -> nn.Module:
    """A new quantizer by its name in a config. Never imports; see Registry.make."""
    return QUANTIZERS.make(name, (codebook_size, codebook_dim), options)
