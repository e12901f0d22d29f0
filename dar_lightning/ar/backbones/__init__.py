"""Backbones other than our Llama, by name or by the class path of your own; configs import no code."""

from dar_lightning.ar.backbones.interface import Backbone, BackboneCache
from dar_lightning.ar.backbones.language_model import LanguageModel
from dar_lightning.ar.backbones.lora import merge_lora
from dar_lightning.ar.config import ARConfig
from dar_lightning.errors import require
from dar_lightning.formats.registry import Registry

__all__ = [
    "Backbone",
    "BackboneCache",
    "LanguageModel",
    "import_backbone",
    "make_backbone",
    "merge_lora",
    "register_backbone",
]

# By name in ARConfig.backbone; "llama" is the model's own.
BACKBONES = Registry("backbone", {"llama": Backbone, "transformers": LanguageModel}, Backbone)
register_backbone, import_backbone = BACKBONES.register, BACKBONES.import_class


def make_backbone(config: ARConfig, length: int) -> Backbone | None:
    """The new backbone that a config names, for sequences of up to `length`; None for "llama". See Registry.make."""
    if config.backbone != "llama":
        return BACKBONES.make(config.backbone, (config, length), config.backbone_options)
    options = ", ".join(config.backbone_options)
    require(not options, f"backbone_options: {options}: backbone 'llama' has no options")
    return None
