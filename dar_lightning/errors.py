"""UserError, a mistake that the user can correct, and how it becomes one line on the command line."""

import math


class UserError(ValueError):
    """A mistake in an option, a config or a file.

    The message is one line that names the option or file, what it was and what would be right. `dar` prints it to
    stderr without a traceback and exits with status 2.
    """


def check_range(least: float, most: float = math.inf, **options: float | None) -> None:
    """Refuse options that are set to less or more than they may be."""
    for name, value in options.items():
        if value is not None and not least <= value <= most:
            raise UserError(
                f"{name} is {value}: must be at least {least}{f', at most {most}' if most < math.inf else ''}"
            )


class OneLineErrors:
    """Mixin for a jsonargparse parser: a mistake becomes one line, without the usage text."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        raise find_user_error(ex) or UserError(" ".join(str(message).split()))


def require(condition: bool, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def find_user_error(error: BaseException | None) -> UserError | None:
    """The UserError at the root of an exception: jsonargparse wraps what constructors raise, several times over."""
    found, seen = None, set()
    while error is not None and id(error) not in seen:  # raised while it is handled, an error can be its own cause
        seen.add(id(error))
        found = error if isinstance(error, UserError) else found
        error = error.__cause__ or error.__context__
    return found


def one_line(error: BaseException) -> str:
    """The first line of an error's message, for an error of our own."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
