"""FrozenNetwork: a pretrained network that is not trained, copied into averages or saved."""

from torch import nn


class FrozenNetwork:
    """Holds a network outside of the module tree, so that optimizers, EMA copies and checkpoints do not see it.

    Its weights stay in float32 and its layers compute in the run's precision; in bfloat16 they would save less than
    0.2 GB and round what norms compute with.
    """

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    def __call__(self, *inputs):
        """Call the network on the device of the first input."""
        return self.network.to(inputs[0].device)(*inputs)

    def __deepcopy__(self, memo) -> "FrozenNetwork":
        return self
