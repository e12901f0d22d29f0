"""A pretrained network that a loss looks through and nothing trains, copies or saves."""

from torch import nn


class FrozenNetwork:
    """Holds a network outside of the module tree, so that optimizers, EMA copies and checkpoints do not see it.

    Args:
        network: put into evaluation mode, without gradients of its own.
    """

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    def __call__(self, *inputs):
        """Call the network on the device of the first input."""
        return self.network.to(inputs[0].device)(*inputs)

    def __deepcopy__(self, memo) -> "FrozenNetwork":
        return self
