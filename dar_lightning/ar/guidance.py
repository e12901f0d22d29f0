"""Classifier-free guidance of the AR model: schedules of its scale over the tokens, and how logits are combined."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor

from dar_lightning.errors import UserError, naming, require
from dar_lightning.files import load_class

# A scale; (a, b), linear over the tokens; or text, "NAME,value,..." or "NAME,key=value,...", whose name is one of
# SCHEDULES or the import path of a class with `scales`. As text, a number and a pair are "3" and "1.1,8".
Guidance = float | tuple[float, float] | str


class GuidanceSchedule(Protocol):
    """Guidance as a function of the token."""

    def scales(self, groups: Sequence[int]) -> Sequence[float]:
        """Scale of each token, from the group (1 to K) that each one belongs to; i counts tokens as they are written.

        1 is no guidance. Where all tokens from some place on have 1, only the conditional half is computed.

        Groups are listed as tokens are written: a model of order "reversed" begins with those of group K. Where each
        sample has its own order, the first tokens that are written count as group 1.

        A class may also have `combine(cond, uncond, scale)`, of logits (..., V) and a scale that is a number or (n, 1):
        the guided logits. Without it they are those of classifier-free guidance.
        """


class _Numbers:
    """Base of schedules whose fields are finite numbers, of which some must not be negative."""

    name: ClassVar[str]
    nonnegative: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            said = f"guidance {self.name}: {each.name} is {value!r}"
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            require(number, f"{said}: it must be a finite number")
            require(each.name not in self.nonnegative or value >= 0, f"{said}: it must be at least 0")


@dataclass(frozen=True)
class Constant(_Numbers):
    """The same scale for every token.

    Args:
        scale: s. Below 0 it leads away from the class.
    """

    scale: float
    name = "constant"

    def scales(self, groups: Sequence[int]) -> list[float]:
        return [float(self.scale)] * len(groups)


@dataclass(frozen=True)
class Linear(_Numbers):
    """Linear over the tokens, the paper's: s_i = first + (last - first) i / (N - 1), i = 0 to N - 1.

    A schedule that starts at exactly 1.0 starts at 1.001, as in the official code, whose numbers we reproduce.

    Args:
        first: scale of the first token.
        last: scale of the last of the model's N tokens.
    """

    first: float
    last: float
    name = "linear"

    def scales(self, groups: Sequence[int]) -> list[float]:
        num_tokens, last = len(groups), self.last
        first = 1.001 if self.first == 1.0 else self.first
        return [first + (last - first) * i / max(num_tokens - 1, 1) for i in range(num_tokens)]


@dataclass(frozen=True)
class PowerCosine(_Numbers):
    """Power-cosine of RAR (arXiv 2411.00776): s_i = 1 + (scale - 1) (1 - cos(pi (i / N)^power)) / 2, i = 0 to N - 1.

    It starts at 1 and comes near `scale` at the end; the larger the power, the later. Power 0 is constant.

    Args:
        scale: the scale that the end comes near, at least 0.
        power: at least 0.
    """

    scale: float
    power: float
    name = "power_cosine"
    nonnegative = ("scale", "power")

    def scales(self, groups: Sequence[int]) -> list[float]:
        num_tokens = len(groups)
        shares = [(1 - math.cos(math.pi * (i / num_tokens) ** self.power)) / 2 for i in range(num_tokens)]
        return [(1 - share) + share * self.scale for share in shares]  # exact for shares of 0 and 1


@dataclass(frozen=True)
class Interval(_Numbers):
    """Guidance for some groups of tokens alone (after arXiv 2404.07724): `scale` in them, 1 before and after.

    Args:
        scale: at least 0.
        from_group: the first group with guidance, from 1.
        to_group: the last one, up to K.
    """

    scale: float
    from_group: int
    to_group: int
    name = "interval"
    nonnegative = ("scale",)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = all(float(group).is_integer() for group in (self.from_group, self.to_group))
        require(whole and self.from_group >= 1, f"{self._said}: groups are whole numbers, from 1")
        require(self.from_group <= self.to_group, f"{self._said} is empty: to_group must be at least from_group")

    @property
    def _said(self) -> str:
        return f"guidance interval: from_group {self.from_group} to_group {self.to_group}"

    def scales(self, groups: Sequence[int]) -> list[float]:
        require(self.to_group <= max(groups), f"{self._said}: this model's tokens are of groups 1 to {max(groups)}")
        inside = [self.from_group <= group <= self.to_group for group in groups]
        require(any(inside), f"{self._said} is empty: no token belongs to it")
        return [float(self.scale) if guided else 1.0 for guided in inside]


@dataclass(frozen=True)
class Projected(_Numbers):
    """Adaptive projected guidance (APG, arXiv 2410.02416) without momentum, on logits: guidance that sharpens less.

    Of logits c and u without their means over the codes, d = c - u is the direction of guidance, d_par its part along
    c, which only sharpens the distribution: guided logits are c + (scale - 1) (d - d_par + eta d_par).

    Args:
        scale: s, of every token.
        eta: share of d_par that is kept: with 1, and no radius, this is classifier-free guidance.
        radius: longest d; a longer one is shortened to it first. 0 is no limit.
    """

    scale: float
    eta: float = 0.0
    radius: float = 0.0
    name = "apg"
    nonnegative = ("eta", "radius")

    def scales(self, groups: Sequence[int]) -> list[float]:
        """See GuidanceSchedule."""
        return [float(self.scale)] * len(groups)

    def combine(self, cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
        """See GuidanceSchedule."""
        cond, uncond = (logits - logits.mean(dim=-1, keepdim=True) for logits in (cond, uncond))
        update = cond - uncond
        if self.radius:
            update = update * (self.radius / update.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        along = F.normalize(cond, dim=-1)
        along = (update * along).sum(dim=-1, keepdim=True) * along
        return cond + (scale - 1) * (update + (self.eta - 1) * along)


# name -> class, called with the values that follow the name
SCHEDULES: dict[str, type[GuidanceSchedule]] = {
    each.name: each for each in (Constant, Linear, PowerCosine, Interval, Projected)
}
Combine = Callable[[Tensor, Tensor, float | Tensor], Tensor] | None  # logits with and without condition, and the scale


def guidance_schedule(
    guidance: Guidance | GuidanceSchedule, num_tokens: int, token_groups: Sequence[int] | None = None
) -> list[float]:
    """Guidance scale of each token; see `scales_and_combine`."""
    return scales_and_combine(guidance, num_tokens, token_groups)[0]


def scales_and_combine(
    guidance: Guidance | GuidanceSchedule, num_tokens: int, token_groups: Sequence[int] | None = None
) -> tuple[list[float], Combine]:
    """Guidance scale of each token, and the function that combines logits, of one schedule.

    Args:
        guidance: a number, a pair, text, or an object with `scales`.
        num_tokens: N.
        token_groups: the group of each token, from 1; None: all are of one.

    Raises:
        UserError: for a name, values or groups that there are not.
    """
    groups = [1] * num_tokens if token_groups is None else token_groups
    schedule = _schedule(guidance)
    scales = [float(scale) for scale in schedule.scales(groups)]
    fits = len(scales) == num_tokens and all(map(math.isfinite, scales))
    require(fits, f"guidance {guidance}: its scales are {scales[:4]}...: need {num_tokens} finite numbers")
    return scales, guidance_combine(schedule)


def guidance_combine(guidance: Guidance | GuidanceSchedule) -> Combine:
    """How a schedule combines logits, if in a way of its own; None: classifier-free guidance."""
    return getattr(_schedule(guidance), "combine", None)


def read_guidance(guidance: Guidance, own_classes: bool = True) -> Guidance:
    """Guidance as options are kept and recorded: text becomes a number, a pair, or "NAME,key=value,..." in full.

    Args:
        guidance: text of a command line, of which all that is no guidance is a UserError; others are as they are.
        own_classes: let the text name a class by its import path, which runs its file.
    """
    if not isinstance(guidance, str):
        return guidance
    name, values, schedule = _read(guidance, own_classes)
    if isinstance(schedule, Constant):
        return float(schedule.scale)
    if isinstance(schedule, Linear):
        return float(schedule.first), float(schedule.last)
    given = [f"{key}={_shown(value)}" for key, value in values.items() if value is not None]
    return ",".join([name, *given])


def guidance_text(guidance: Guidance) -> str:
    """Guidance as text, as a command line has it: "3", "1.1,8", or the name with its values."""
    if isinstance(guidance, str):
        return guidance
    return ",".join(str(_shown(scale)) for scale in (guidance if isinstance(guidance, tuple | list) else [guidance]))


def guided_tokens(scales: Sequence[float]) -> int:
    """How many of the first tokens need unconditional logits: all up to the last whose scale is not 1.

    A last token alone, as of a linear schedule that ends at 1, keeps them: it would not save a step.
    """
    guided = max((i for i, scale in enumerate(scales, start=1) if scale != 1.0), default=0)
    return len(scales) if 0 < guided == len(scales) - 1 else guided


def guide(logits: Tensor, scale: float | Tensor, combine: Combine = None) -> Tensor:
    """Guidance on stacked [conditional, unconditional] logits, classifier-free or another: (2B, V) -> (B, V)."""
    cond, uncond = logits.chunk(2)
    return uncond + scale * (cond - uncond) if combine is None else combine(cond, uncond, scale)


_FORMS = (
    f"give a number, or a,b for linear over the tokens, or NAME,value,... with {', '.join(SCHEDULES)} or the import "
    "path of a class with `scales`"
)


def _schedule(guidance: Guidance | GuidanceSchedule) -> GuidanceSchedule:
    if hasattr(guidance, "scales"):
        return guidance
    if isinstance(guidance, str):
        return _read(guidance)[-1]
    if isinstance(guidance, tuple | list):
        require(len(guidance) == 2, f"guidance is {guidance}: {_FORMS}")
        return Linear(*map(float, guidance))
    return Constant(float(guidance))


def _read(text: str, own_classes: bool = True) -> tuple[str, dict[str, Any], GuidanceSchedule]:
    """A schedule's name, its values by parameter, with those that the text leaves out, and the schedule."""
    words = [word.strip() for word in text.split(",")]
    if len(words) <= 2 and not any(isinstance(_number(word), str) for word in words):
        words = [("constant", "linear")[len(words) - 1], *words]
    name, *values = words
    made: Any = SCHEDULES.get(name)
    if made is None:
        own = own_classes and "." in name and isinstance(_number(name), str)
        require(own, f"guidance is {text!r}: {_FORMS}")
        made = load_class(name, f"guidance {name}", f"{', '.join(SCHEDULES)} or the import path of a class")
        fits = isinstance(made, type) and callable(getattr(made, "scales", None))
        require(fits, f"guidance {name}: must be a class with a method `scales`, is {made!r}")
    signature = inspect.signature(made)
    pairs = [value.split("=", 1) for value in values if "=" in value]
    named = dict(pairs)
    require(len(named) == len(pairs), f"guidance is {text!r}: it gives a value twice")
    try:
        bound = signature.bind(
            *(_number(value) for value in values if "=" not in value),
            **{key.strip(): _number(value.strip()) for key, value in named.items()},
        )
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "no value"
        raise UserError(f"guidance is {text!r}: {name} takes {takes} ({error})") from error
    bound.apply_defaults()
    with naming(f"guidance is {text!r}: {name}", TypeError, ValueError):
        return name, bound.arguments, made(*bound.args, **bound.kwargs)


def _number(word: str) -> int | float | str:
    """A word as the number that it is, or as it is."""
    try:
        return _shown(float(word))
    except ValueError:
        return word


def _shown(value: Any) -> Any:
    """A whole number without its fraction (3.0 as 3), so that equal values give equal texts."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
