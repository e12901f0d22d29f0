"""Classes by name in a config: the package's, and a user's own by class path. A config alone imports no code."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from dar_lightning.errors import UserError, require
from dar_lightning.files import load_class


class Registry:
    """Classes of one kind by their names in configs. Those of a user's own have a dot in their names.

    Args:
        what: the kind, such as "quantizer", as error lines call it.
        classes: the package's, by name.
        base: what they inherit from; its `tables`, if it has any, names buffers that need not be saved.
        needs: attributes that an object of theirs has.
    """

    def __init__(self, what: str, classes: dict[str, type], base: type = nn.Module, needs: tuple[str, ...] = ()):
        self.what, self.classes, self.base, self.needs = what, classes, base, needs

    def register(self, kind: type, name: str | None = None) -> type:
        """Let configs and saved weights name a class of your own; also a class decorator.

        Args:
            kind: the class, of torch modules.
            name: what configs call it, with a dot in it; None is its class path.

        Returns:
            The class.

        Raises:
            UserError: it is no class of modules, or the name has no dot.
        """
        is_module = isinstance(kind, type) and issubclass(kind, nn.Module)
        require(is_module, f"register_{self.what}: {kind!r} is no torch module class")
        name = f"{kind.__module__}.{kind.__qualname__}" if name is None else name
        require("." in name, f"register_{self.what}: name is {name!r}: it needs a dot, as a class path has")
        self.classes[name] = kind
        return kind

    def import_class(self, name: str) -> None:
        """Import and register the class that a class path names; nothing for a name that is known.

        For paths that the user has typed, never for those of weights from elsewhere. UserError if there is no such
        class.
        """
        if name not in self.classes:
            self.register(load_class(name, f"{self.what} {name}", "a class that can be imported"), name)

    def find(self, name: str) -> type:
        """The class of a name; UserError if nobody has registered it. Never imports."""
        what, kind = self.what, self.classes.get(name)
        if kind is None and "." in name:
            how = f"call register_{what}({name.rpartition('.')[2]}) first, or give dar the option --trust {name}"
            raise UserError(f"{what} is {name!r}, a class that is not registered, and a config imports no code: {how}")
        known = " or ".join(repr(each) for each in self.classes if "." not in each)
        require(kind is not None, f"{what} is {name!r}: it must be {known}, or the class path of your own")
        return kind

    def make(self, name: str, sizes: tuple, options: Mapping[str, Any]) -> nn.Module:
        """A new object of a name's class, of these sizes and options. Never imports.

        Raises:
            UserError: nobody has registered the name; the class is of another kind, has no such options, or refuses
                them or the sizes; the object has buffers that a loaded model would find empty.
        """
        what, kind = self.what, self.find(name)
        title = what.capitalize()
        inherit = f"inherit from {self.base.__module__}.{self.base.__qualname__}"
        require(issubclass(kind, self.base), f"{what} {name} is no {title}: {inherit}")
        self._check_options(kind, name, options, len(sizes))
        made = kind(*sizes, **options)
        lacks = [each for each in self.needs if not hasattr(made, each)]
        require(not lacks, f"{what} {name} is no {title}: it has no {', '.join(lacks)}")
        computed = made.tables() if hasattr(self.base, "tables") else {}
        unsaved = {each for each, _ in made.named_buffers()} - made.state_dict().keys() - computed.keys()
        need = "a loaded model would find it empty; compute it, or save it"
        require(not unsaved, f"{what} {name} has the buffer {', '.join(sorted(unsaved))}, which is not saved: {need}")
        return made

    def _check_options(self, kind: type, name: str, options: Mapping[str, Any], sizes: int) -> None:
        """Refuse options that a class does not take; its first arguments are sizes."""
        parameters = list(inspect.signature(kind).parameters.values())[sizes:]
        if any(each.kind is each.VAR_KEYWORD for each in parameters):
            return
        defaults = {each.name: each.default for each in parameters}
        for option, value in options.items():
            said = f"{self.what}_options: {option} is {value!r}: {name}"
            has = f"has {'the options ' if defaults else 'no options'}{', '.join(defaults)}"
            require(option in defaults, f"{said} {has}")
            fits = type(defaults[option]) not in (int, float) or type(value) in (int, float)
            require(fits, f"{said} needs a number")


def check_plain(options: Mapping[str, Any], what: str, nested: bool = False) -> None:
    """Refuse options that JSON cannot write and read as they are, or more than 32 of them.

    With `nested`, null and mappings are values, too.
    """
    require(len(options) <= 32, f"{what}_options has more than 32 entries")
    for name, value in options.items():
        plain = type(name) is str and _is_plain(value, nested)
        need = "it must be a number, a word, true or false, or a list of them"
        require(plain, f"{what}_options: {name} is {value!r}: {need}")


def _is_plain(value: Any, nested: bool) -> bool:
    if nested and type(value) is dict:
        return all(type(name) is str and _is_plain(each, nested) for name, each in value.items())
    values = value if type(value) is list else [value]
    kinds = (str, bool, int, type(None)) if nested else (str, bool, int)
    return all(type(each) in kinds or (type(each) is float and math.isfinite(each)) for each in values)
