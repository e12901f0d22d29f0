"""Weighting of a loss: constant, by flow time, from a given step on."""

from torch import Tensor

from dar_lightning.errors import UserError


class WeightedLoss:
    """What LPIPS, REPA and the adversarial loss have in common.

    Args:
        weight: factor of the loss.
        t_power: an image's loss is multiplied by its flow time t (0: noise, 1: image) to this power. 0 weighs all times
            alike, as the paper does; above 0, estimates that know little of their image count less.
        start_step: number of optimizer steps that the tokenizer takes without this loss.
    """

    def __init__(self, weight: float, t_power: float, start_step: int):
        self.weight, self.t_power, self.start_step = weight, t_power, start_step
        for name in ("weight", "t_power", "start_step"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"{name} is {value}: it must be at least 0")

    def has_started(self, steps_done: int) -> bool:
        """Whether the loss counts after this many optimizer steps."""
        return steps_done >= self.start_step

    def mean(self, each: Tensor, t: Tensor) -> Tensor:
        """Mean of t^t_power times the loss of each image: (B,) and flow times (B,) -> a scalar without `weight`."""
        return (t**self.t_power * each).mean()
