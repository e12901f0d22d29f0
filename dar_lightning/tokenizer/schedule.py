"""GroupSchedule: which tokens a diffusion step reads (paper, section 3.1).

Uniform time u in [0, 1] runs from noise to image. Each u belongs to one of K groups of tokens, and a diffusion step
reads the n consecutive tokens that start at its group. All arithmetic is in integers, so training and sampling agree.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dar_lightning.errors import require
from dar_lightning.tokenizer.config import TokenizerConfig


@dataclass(frozen=True)
class GroupSchedule:
    """Which tokens a diffusion step reads.

    Args:
        num_tokens: N.
        num_groups: K; N is a multiple of it.
        window: n, tokens read by one step.
        rounding: group of a training time u, counted from 0: "round" is floor(u K + 0.5), the official code: the first
            group gets half the training mass of the middle ones, the last 1.5 times; "ceil" is ceil(u K) - 1 (the
            paper's ceiling, which counts from 1), all groups equal.
    """

    num_tokens: int
    num_groups: int
    window: int
    rounding: str = "round"

    @classmethod
    def from_config(cls, config: TokenizerConfig) -> "GroupSchedule":
        return cls(config.num_tokens, config.num_groups, config.window, config.group_rounding)

    def group_of_time(self, u: Tensor) -> Tensor:
        """Group that trains at uniform times u in [0, 1]: same shape, int64, from 0 to K (K only for "round")."""
        scaled = u * self.num_groups
        if self.rounding == "round":
            return torch.floor(scaled + 0.5).long()
        return (torch.ceil(scaled).long() - 1).clamp(min=0)

    def group_of_step(self, step: int, num_steps: int) -> int:
        """Group that serves sampling step `step` of `num_steps`; with num_steps == K, group i serves step i."""
        if self.rounding == "round":
            return (2 * step * self.num_groups + num_steps) // (2 * num_steps)
        return step * self.num_groups // num_steps

    def start(self, group):
        """First token of a group's window, for an int or an int64 tensor: clamped so that the window fits."""
        first = group * self.num_tokens // self.num_groups
        last = self.num_tokens - self.window
        return first.clamp(max=last) if isinstance(first, Tensor) else min(first, last)

    def windows(self, u: Tensor) -> Tensor:
        """Token indices read at uniform times u: (B,) -> (B, n) int64."""
        return self.start(self.group_of_time(u))[:, None] + torch.arange(self.window, device=u.device)

    def tokens_for_groups(self, groups: int) -> int:
        """Tokens that must exist before the first `groups` groups (1..K) have all been read; all N for all K."""
        known = 1 <= groups <= self.num_groups
        require(known, f"groups is {groups}: a preview needs from 1 to {self.num_groups} groups")
        return self.num_tokens if groups == self.num_groups else self.start(groups - 1) + self.window

    def steps_for_groups(self, groups: int, num_steps: int) -> int:
        """How many of num_steps sampling steps read only the first `groups` groups (at least 1, all for all K)."""
        # With more steps than groups, "round" also counts a group K, whose window ends the sequence.
        if groups == self.num_groups:
            return num_steps
        return sum(self.group_of_step(i, num_steps) < groups for i in range(num_steps))

    def stratified_times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Draw times (batch,) in [0, 1) that meet every group equally often, in random order, for validation."""
        # One from each of `batch` equal slices of a scale on which every group has the same length.
        draws = torch.rand(batch, generator=generator)
        slices = torch.randperm(batch, generator=generator)
        position = (slices + draws) / batch * self.num_groups
        group = position.floor().clamp(max=self.num_groups - 1)
        # The times that train a group, of which the last one also gets those that round up to K.
        offset = 0.5 if self.rounding == "round" else 0.0
        low = (group - offset).clamp(min=0) / self.num_groups
        high = torch.where(group == self.num_groups - 1, self.num_groups, group + 1 - offset) / self.num_groups
        return low + (position - group) * (high - low)
