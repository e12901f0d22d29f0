"""Quantizers by name: latents to codes and back. Classes of your own by class path; a config alone imports no code."""

from typing import Any

from torch import nn

from dar_lightning.formats import registry
from dar_lightning.tokenizer.quantizers.bsq import BinarySphericalQuantizer
from dar_lightning.tokenizer.quantizers.fsq import FiniteScalarQuantizer
from dar_lightning.tokenizer.quantizers.ibq import IndexBackpropagationQuantizer
from dar_lightning.tokenizer.quantizers.interface import Quantized, Quantizer
from dar_lightning.tokenizer.quantizers.lfq import LookupFreeQuantizer
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

# name in TokenizerConfig.quantizer -> class. Those of your own, which register_quantizer adds, have a dot.
QUANTIZERS: dict[str, type] = {
    "vq": VectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
    "ibq": IndexBackpropagationQuantizer,
    "simvq": SimVectorQuantizer,
}


def register_quantizer(quantizer: type, name: str | None = None) -> type:
    """Let configs and saved weights name a quantizer class of your own; also a class decorator.

    Args:
        quantizer: a torch module class that follows Quantizer.
        name: what configs call it, with a dot in it; None is its class path.

    Returns:
        The class.

    Raises:
        UserError: it is no class of modules, or the name has no dot.
    """
    return registry.register(QUANTIZERS, "quantizer", quantizer, name)


def import_quantizer(name: str) -> None:
    """Import and register the class that a class path names; nothing for a name that is known.

    For paths that the user has typed, never for those of weights from elsewhere. UserError if there is no such class.
    """
    registry.import_named(QUANTIZERS, "quantizer", name)


def make_quantizer(name: str, codebook_size: int, codebook_dim: int, options: dict[str, Any]) -> nn.Module:
    """A new quantizer by its name in a config. Never imports.

    Raises:
        UserError: nobody has registered the name; the class is no Quantizer; it has no such options, or refuses them or
            the sizes.
    """
    kind = registry.find(QUANTIZERS, "quantizer", name)
    registry.check_options(kind, "quantizer", name, options, skip=2)
    made = kind(codebook_size, codebook_dim, **options)
    registry.check_made(made, "quantizer", name, ("nearest", "lookup", "bypass"))
    return made
