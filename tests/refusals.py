"""Refusals of bad input: one line, raised by a function as a UserError or said by a command that ends with status 2."""

from collections.abc import Callable

import pytest

from dar_lightning.cli import main
from dar_lightning.errors import UserError


def refused(match: str, function: Callable, *given, **options) -> None:
    """A call must raise a UserError of one line in which the pattern is found."""
    with pytest.raises(UserError, match=match) as caught:
        function(*given, **options)
    assert "\n" not in str(caught.value)


def refusal(capsys, words: list, before: str = "Seed set to") -> str:
    """The only line that `dar` says on stderr, but for what begins with `before`, when it ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    (said,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(before)]
    assert stop.value.code == 2
    assert said.startswith(f"dar {words[0]}: ")
    return said
