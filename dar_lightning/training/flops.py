"""FLOPs of a training step, counted on tensors without data."""

import copy
import warnings

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dar_lightning.data.transforms import to_float
from dar_lightning.training.ar import ARModule
from dar_lightning.training.losses import AdversarialLoss
from dar_lightning.training.tokenizer import TokenizerModule


def step_flops(module: LightningModule, batch: dict) -> int:
    """Operations of matrix products, convolutions and attention in one forward and backward pass over a batch.

    The loss networks count, with every loss as if it had started; the optimizer, and what activation checkpointing
    computes twice, do not. A multiplication and an addition are two operations; causal attention counts half, as its
    queries see half of the keys on average. The module and the random numbers stay as they are.
    """
    # The frozen networks of losses are real tensors among the others, which have no values.
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = {name: shapes.from_tensor(value) for name, value in batch.items() if isinstance(value, Tensor)}
    # The counter knows not every fused attention; MATH is made of products that it knows.
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with shapes, torch.device(module.device):
            twin = _twin(module)
        with _HalfOfTheKeys(masks=isinstance(twin, ARModule)):
            if isinstance(twin, ARModule):
                with shapes:  # the batch may hold texts: the null condition has their shape
                    condition = twin.ar.condition.null(len(inputs["codes"]))
                loss = twin.ar(condition, *twin.arrange(inputs["codes"])).float().mean()
            else:
                images = to_float(inputs["image"])
                loss, _ = twin.total_loss(twin.tokenizer.training_losses(images), images)
            loss.backward()
    return counter.get_total_flops()


class _HalfOfTheKeys(TorchFunctionMode):
    """Turns causal attention into attention to the first half of the keys: the shapes are those of what it costs.

    With `masks`, attention with a mask is causal too: that of an AR model's training.
    """

    def __init__(self, masks: bool):
        super().__init__()
        self.masks = masks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        attention = func is F.scaled_dot_product_attention
        if attention and self.masks and kwargs.get("attn_mask") is not None:
            kwargs |= {"attn_mask": None, "is_causal": True}
        if attention and kwargs.pop("is_causal", False):
            query, *keys_and_values = args
            args = (query, *(tensor[..., : tensor.shape[-2] // 2, :] for tensor in keys_and_values))
        return func(*args, **kwargs)


def _twin(module: LightningModule) -> LightningModule:
    """A module of the same structure, newly built: neither compiled, nor wrapped, nor sharded."""
    if isinstance(module, ARModule):
        return type(module)(module.ar.config)
    losses = {name: copy.copy(getattr(module, name)) for name in ("perceptual", "repa")}
    if (adversarial := module.adversarial) is not None:
        losses["adversarial"] = AdversarialLoss(channels=adversarial.channels, depth=adversarial.depth)
    for loss in filter(None, losses.values()):
        loss.start_step = 0
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of its metric, which copies a fake tensor
        twin = TokenizerModule(module.tokenizer.config, **losses)
    twin.tokenizer.quantizer.eval()  # in training, ranks meet for its losses
    if module.freeze_encoder:
        twin.freeze_tokens()
    return twin
