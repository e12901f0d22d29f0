"""Backbones other than our Llama, by name or by the class path of your own; configs import no code."""

from dar_lightning.ar.backbones.interface import Backbone, BackboneCache
from dar_lightning.ar.backbones.language_model import LanguageModel
from dar_lightning.ar.backbones.lora import merge_lora
from dar_lightning.ar.config import ARConfig
from dar_lightning.errors import require
from dar_lightning.formats import registry

__all__ = [
    "Backbone",
    "BackboneCache",
    "LanguageModel",
    "import_backbone",
    "make_backbone",
    "merge_lora",
    "register_backbone",
]

# name in ARConfig.backbone -> class. "llama" is the model's own; those of a user have a dot (register_backbone).
BACKBONES: dict[str, type] = {"llama": Backbone, "transformers": LanguageModel}


def register_backbone(backbone: type, name: str | None = None) -> type:
    """Let configs and saved weights name a Backbone class of your own; also a class decorator.

    Args:
        backbone: the class.
        name: what configs call it, with a dot in it; None is its class path.

    Returns:
        The class.

    Raises:
        UserError: it is no class of modules, or the name has no dot.
    """
    return registry.register(BACKBONES, "backbone", backbone, name)


def import_backbone(name: str) -> None:
    """Import and register the class that a class path names; nothing for a name that is known.

    For paths that the user has typed, never for those of weights from elsewhere. UserError if there is no such class.
    """
    registry.import_named(BACKBONES, "backbone", name)


def make_backbone(config: ARConfig, length: int) -> Backbone | None:
    """The new backbone that a config names, for sequences of up to `length`; None for "llama". Never imports.

    Raises:
        UserError: nobody has registered the name; the class is no Backbone; it has no such options, or refuses them.
    """
    name, options = config.backbone, config.backbone_options
    if name == "llama":
        require(not options, f"backbone_options: {', '.join(options)}: backbone 'llama' has no options")
        return None
    kind = registry.find(BACKBONES, "backbone", name)
    require(issubclass(kind, Backbone), f"backbone {name} is no Backbone: inherit from ar.backbones.Backbone")
    registry.check_options(kind, "backbone", name, options, skip=2)
    made = kind(config, length, **options)
    registry.check_made(made, "backbone", name, ("make_cache",), computed=made.tables())
    return made
