"""Classes by name in a config: the package's, and a user's own by class path. A config alone imports no code."""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dar_lightning.errors import UserError, require
from dar_lightning.files import load_class

Table = dict[str, type]  # name in a config -> class. Those of a user's own have a dot.


def register(table: Table, what: str, kind: type, name: str | None) -> type:
    """Let configs and saved weights name a class of the user's own; `what` it is, such as "quantizer", for errors.

    Raises:
        UserError: it is no class of modules, or the name has no dot.
    """
    is_module = isinstance(kind, type) and issubclass(kind, nn.Module)
    require(is_module, f"register_{what}: {kind!r} is no torch module class")
    name = f"{kind.__module__}.{kind.__qualname__}" if name is None else name
    require("." in name, f"register_{what}: name is {name!r}: it needs a dot, as a class path has")
    table[name] = kind
    return kind


def import_named(table: Table, what: str, name: str) -> None:
    """Import and register the class that a class path names; nothing for a name that is known."""
    if name in table:
        return
    register(table, what, load_class(name, f"{what} {name}", "a class that can be imported"), name)


def find(table: Table, what: str, name: str) -> type:
    """The class of a name; UserError if nobody has registered it. Never imports."""
    if (kind := table.get(name)) is None:
        if "." in name:
            how = f"call register_{what}({name.rpartition('.')[2]}) first, or give dar the option --trust {name}"
            raise UserError(f"{what} is {name!r}, a class that is not registered, and a config imports no code: {how}")
        known = " or ".join(repr(each) for each in table if "." not in each)
        raise UserError(f"{what} is {name!r}: it must be {known}, or the class path of your own")
    return kind


def check_options(kind: type, what: str, name: str, options: Mapping[str, Any], skip: int) -> None:
    """Refuse options that a class does not take; its first `skip` arguments are no options."""
    parameters = list(inspect.signature(kind).parameters.values())[skip:]
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return
    defaults = {each.name: each.default for each in parameters}
    for option, value in options.items():
        has = f"{name} has {'the options ' if defaults else 'no options'}{', '.join(defaults)}"
        require(option in defaults, f"{what}_options: {option} is {value!r}: {has}")
        number = type(defaults[option]) in (int, float)
        fits = not number or type(value) in (int, float)
        require(fits, f"{what}_options: {option} is {value!r}: {name} needs a number")


def check_made(made: nn.Module, what: str, name: str, needed: Iterable[str]) -> None:
    """Refuse an object that lacks attributes, or has buffers that a loaded model would find empty."""
    lacks = [each for each in needed if not hasattr(made, each)]
    require(not lacks, f"{what} {name} is no {what.capitalize()}: it has no {', '.join(lacks)}")
    unsaved = {each for each, _ in made.named_buffers()} - made.state_dict().keys()
    need = "a loaded model would find it empty; compute it, or save it"
    require(not unsaved, f"{what} {name} has the buffer {', '.join(sorted(unsaved))}, which is not saved: {need}")


def check_plain(options: Mapping[str, Any], what: str) -> None:
    """Refuse options that JSON cannot write and read as they are, or more than 32 of them."""
    require(len(options) <= 32, f"{what}_options has more than 32 entries")
    for name, value in options.items():
        values = value if type(value) is list else [value]
        plain = type(name) is str and all(map(_is_plain, values))
        need = "it must be a number, a word, true or false, or a list of them"
        require(plain, f"{what}_options: {name} is {value!r}: {need}")


def _is_plain(value: Any) -> bool:
    return type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value))
