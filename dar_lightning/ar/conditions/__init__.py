"""Conditions by name: what a picture is asked for, as a prefix. Own classes by class path; configs import no code."""

import json
from pathlib import Path
from typing import Any

from dar_lightning.ar.conditions.backbone_text import BackboneText
from dar_lightning.ar.conditions.caption_tokens import CaptionTokens
from dar_lightning.ar.conditions.class_label import ClassLabel
from dar_lightning.ar.conditions.features import EncoderFeatures
from dar_lightning.ar.conditions.interface import Condition, Prefix
from dar_lightning.ar.conditions.none import NoCondition
from dar_lightning.errors import UserError, require
from dar_lightning.formats import registry

__all__ = [
    "BackboneText",
    "CaptionTokens",
    "ClassLabel",
    "Condition",
    "EncoderFeatures",
    "NoCondition",
    "Prefix",
    "import_condition",
    "make_condition",
    "read_options",
    "register_condition",
]

# name in ARConfig.condition -> class. Those of your own, which register_condition adds, have a dot.
CONDITIONS: dict[str, type] = {
    "class": ClassLabel,
    "none": NoCondition,
    "caption_tokens": CaptionTokens,
    "features": EncoderFeatures,
    "backbone_text": BackboneText,
}
FILE = "condition.json"  # what `dar extract` writes for `read_options`


def register_condition(condition: type, name: str | None = None) -> type:
    """Let configs and saved weights name a Condition class of your own; also a class decorator.

    Args:
        condition: the class.
        name: what configs call it, with a dot in it; None is its class path.

    Returns:
        The class.

    Raises:
        UserError: it is no class of modules, or the name has no dot.
    """
    return registry.register(CONDITIONS, "condition", condition, name)


def import_condition(name: str) -> None:
    """Import and register the class that a class path names; nothing for a name that is known.

    For paths that the user has typed, never for those of weights from elsewhere. UserError if there is no such class.
    """
    registry.import_named(CONDITIONS, "condition", name)


def make_condition(name: str, dim: int, options: dict[str, Any]) -> Condition:
    """A new condition by its name in a config. Never imports.

    Raises:
        UserError: nobody has registered the name; the class is no Condition; it has no such options, or refuses them.
    """
    kind = registry.find(CONDITIONS, "condition", name)
    registry.check_options(kind, "condition", name, options, skip=1)
    require(issubclass(kind, Condition), f"condition {name} is no Condition: inherit from ar.conditions.Condition")
    made = kind(dim, **options)
    registry.check_made(made, "condition", name, ())
    return made


def read_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a training config, with those of the JSON file that `file` names, if it is there, as defaults.

    For configs that the user wrote: weights name no file.
    """
    if "file" not in options:
        return options
    options = dict(options)
    path = Path(str(options.pop("file")))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["condition_options"] | options
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"condition_options: file is {path}, which is no {FILE} of dar extract ({type(error).__name__})"
        ) from error
