"""UserError, a mistake that the user can correct, and how it becomes one line on the command line."""

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

MOST_PIXELS, MOST_BLOCKS = 2**14, 10**5  # on a side of an image; of a Transformer
phase = SimpleNamespace(working=False)  # of this process: whether the verb's work has begun


def begin_work() -> None:
    """Say that all is built and checked, and the work begins: a verb's own, or a run's after its first batch.

    Whatever is raised before is taken for a mistake of the user's and becomes one line; what is raised later is a fault
    of this program or the machine, and keeps its traceback (`cli.main`).
    """
    phase.working = True


class UserError(ValueError):
    """A mistake in an option, a config or a file.

    The message is one line that names the option or file, what it was and what would be right. `dar` prints it to
    stderr without a traceback and exits with status 2.
    """


class MachineFault(UserError):
    """A fault of a machine that a run depends on, such as a server that has gone: the user has made no mistake.

    It is one line, too, but `dar` exits with status 1: the same command goes on where it stopped.
    """


def check_range(least: float, most: float = math.inf, **options: float | None) -> None:
    """Refuse options that are set to less or more than they may be, and infinity, which no option may be."""
    for name, value in options.items():
        if value is not None and not (least <= value <= most and value < math.inf):
            raise UserError(
                f"{name} is {value}: must be at least {least}{f', at most {most}' if most < math.inf else ''}"
            )


@contextmanager
def naming(option: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what is raised into a UserError that names the option: for what a library makes of its value.

    Args:
        option: what the line begins with.
        kinds: errors that become one; none given: all. OSError is for opening or making what the user named;
            everywhere else such an error is one of this program, and stays a traceback.

    Raises:
        UserError: something of these kinds was raised; if it was one, that one.
    """
    kinds = kinds or (Exception,)
    try:
        yield
    except kinds as error:
        raise find_user_error(error) or UserError(f"{option}: {whole_line(error)}") from error


class OneLineErrors:
    """Mixin for a jsonargparse parser: a mistake becomes one line, without the usage text.

    Null is a mistake wherever its option does not say that it may be, also within a class: jsonargparse alone passes
    it on as if nothing had been given.
    """

    def validate(self, *args, **kwargs) -> None:
        super().validate(*args, **kwargs | {"skip_unset": False})

    def error(self, message: str, ex: Exception | None = None) -> None:
        raise find_user_error(ex) or UserError(" ".join(str(message).split()))


def require(condition: object, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def find_user_error(error: BaseException | None) -> UserError | None:
    """The UserError at the root of an exception: jsonargparse wraps what constructors raise, several times over."""
    found, seen = None, set()
    while error is not None and id(error) not in seen:  # raised while it is handled, an error can be its own cause
        seen.add(id(error))
        found = error if isinstance(error, UserError) else found
        whole = isinstance(error, UserError) and error.__suppress_context__  # raised `from None`, or from its cause
        error = error.__cause__ or (None if whole else error.__context__)
    return found


def one_line(error: BaseException) -> str:
    """The first line of an error's message, for an error of our own."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def whole_line(error: BaseException) -> str:
    """An error's message as one line, for an error of a library; with its type, where that says more than the words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    words = textwrap.shorten(str(error), 500, placeholder=" ...")
    return words if " " in words else f"{type(error).__name__} {words}".strip()
