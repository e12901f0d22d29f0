"""Conditions by name: what a picture is asked for, as a prefix. Own classes by class path; configs import no code."""

import json
from pathlib import Path
from typing import Any

from dar_lightning.ar.conditions.backbone_text import BackboneText
from dar_lightning.ar.conditions.caption_tokens import CaptionTokens
from dar_lightning.ar.conditions.class_label import ClassLabel, NoCondition
from dar_lightning.ar.conditions.features import EncoderFeatures
from dar_lightning.ar.conditions.interface import Condition, Prefix
from dar_lightning.errors import UserError
from dar_lightning.formats.registry import Registry

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

CONDITIONS = Registry(
    "condition",
    {  # by name in ARConfig.condition
        "class": ClassLabel,
        "none": NoCondition,
        "caption_tokens": CaptionTokens,
        "features": EncoderFeatures,
        "backbone_text": BackboneText,
    },
    base=Condition,
)
register_condition, import_condition = CONDITIONS.register, CONDITIONS.import_class
FILE = "condition.json"  # what `dar extract` writes for `read_options`


def make_condition(name: str, dim: int, options: dict[str, Any]) -> Condition:
    """A new condition by its name in a config. Never imports; see Registry.make."""
    return CONDITIONS.make(name, (dim,), options)


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
