"""Classifier-free guidance of the AR model: its scale for each token, and how logits are combined."""

from torch import Tensor

from dar_lightning.errors import UserError

Guidance = float | tuple[float, float]


def guidance_schedule(guidance: Guidance, num_tokens: int) -> list[float]:
    """Guidance scale of each token: a constant, or linear from a at the first token to b at the last.

    A schedule that starts at exactly 1.0 starts at 1.001, as in the official code, whose numbers we reproduce.
    """
    if not isinstance(guidance, tuple | list):
        return [float(guidance)] * num_tokens
    first, last = guidance
    first = 1.001 if first == 1.0 else first
    return [first + (last - first) * i / max(num_tokens - 1, 1) for i in range(num_tokens)]


def read_guidance(guidance: Guidance | str) -> Guidance:
    """Guidance from a number, a pair, or the text "a,b" of a command line, of which all else is a UserError."""
    if not isinstance(guidance, str):
        return guidance
    try:
        first, last = (float(word) for word in guidance.split(","))
    except ValueError as error:
        raise UserError(f"guidance is {guidance!r}: give a number, or a,b for linear over the tokens") from error
    return first, last


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on stacked [conditional, unconditional] logits: (2B, V) -> (B, V)."""
    cond, uncond = logits.chunk(2)
    return uncond + scale * (cond - uncond)
