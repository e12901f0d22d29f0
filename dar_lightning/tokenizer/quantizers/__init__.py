"""Quantizers by name: latents to codes and back. Classes of your own by class path; a config alone imports no code."""

import inspect
from typing import Any

from torch import nn

from dar_lightning.errors import UserError, require
from dar_lightning.files import load_class
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
    is_module = isinstance(quantizer, type) and issubclass(quantizer, nn.Module)
    require(is_module, f"register_quantizer: {quantizer!r} is no torch module class")
    name = f"{quantizer.__module__}.{quantizer.__qualname__}" if name is None else name
    require("." in name, f"register_quantizer: name is {name!r}: it needs a dot, as a class path has")
    QUANTIZERS[name] = quantizer
    return quantizer


def import_quantizer(name: str) -> None:
    """Import and register the class that a class path names; nothing for a name that is known.

    For paths that the user has typed, never for those of weights from elsewhere. UserError if there is no such class.
    """
    if name in QUANTIZERS:
        return
    register_quantizer(load_class(name, f"quantizer {name}", "a class that can be imported"), name)


def make_quantizer(name: str, codebook_size: int, codebook_dim: int, options: dict[str, Any]) -> nn.Module:
    """A new quantizer by its name in a config. Never imports.

    Raises:
        UserError: nobody has registered the name; the class is no Quantizer; it has no such options, or refuses them or
            the sizes.
    """
    if (kind := QUANTIZERS.get(name)) is None:
        if "." in name:
            how = f"call register_quantizer({name.rpartition('.')[2]}) first, or give dar the option --trust {name}"
            raise UserError(
                f"quantizer is {name!r}, a class that is not registered, and a config imports no code: {how}"
            )
        known = " or ".join(repr(each) for each in QUANTIZERS if "." not in each)
        raise UserError(f"quantizer is {name!r}: it must be {known}, or the class path of your own")
    parameters = list(inspect.signature(kind).parameters.values())[2:]
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        defaults = {each.name: each.default for each in parameters}
        for option, value in options.items():
            has = f"{name} has {'the options ' if defaults else 'no options'}{', '.join(defaults)}"
            require(option in defaults, f"quantizer_options: {option} is {value!r}: {has}")
            number = type(defaults[option]) in (int, float)
            fits = not number or type(value) in (int, float)
            require(fits, f"quantizer_options: {option} is {value!r}: {name} needs a number")
    made = kind(codebook_size, codebook_dim, **options)
    lacks = [each for each in ("nearest", "lookup", "bypass") if not hasattr(made, each)]
    require(not lacks, f"quantizer {name} is no Quantizer: it has no {', '.join(lacks)}")
    unsaved = {each for each, _ in made.named_buffers()} - made.state_dict().keys()
    need = "a loaded model would find it empty; compute it, or save it"
    require(not unsaved, f"quantizer {name} has the buffer {', '.join(sorted(unsaved))}, which is not saved: {need}")
    return made
