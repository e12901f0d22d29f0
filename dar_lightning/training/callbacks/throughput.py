"""How fast training is, and how much of the device it uses."""

from time import perf_counter

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback

from dar_lightning.errors import UserError
from dar_lightning.training.flops import step_flops
from dar_lightning.training.log_step import is_log_step


class Throughput(Callback):
    """Logs speed, every `trainer.log_every_n_steps` steps, of the time since it was last logged, without validation.

    - `speed/images_per_second`, `speed/tokens_per_second`: of all devices together.
    - `speed/tflops`: teraFLOP/s of each device: the operations of a forward and backward pass (`flops.step_flops`),
      counted once, before the first step.
    - `speed/mfu`: the same as a share of the device's peak: model FLOPs utilisation, 0 to 1. Only where the peak is
      known.

    Args:
        peak_tflops: peak of one device in teraFLOP/s, dense, in the precision of the run; None takes it from
            Lightning's table of GPUs.

    Raises:
        UserError: if peak_tflops is not positive.
    """

    def __init__(self, peak_tflops: float | None = None):
        if peak_tflops is not None and peak_tflops <= 0:
            raise UserError(f"peak_tflops is {peak_tflops}: it must be positive, or null for the table's")
        self.peak_tflops = peak_tflops
        self._start = self._batch_end = 0.0  # seconds
        self._images, self._image_flops = 0, 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        peak = self.peak_tflops and self.peak_tflops * 1e12
        self._peak = peak or get_available_flops(pl_module.device, _dtype(trainer.precision))
        model = getattr(pl_module, "tokenizer", None) or pl_module.ar
        self._tokens, self._image_flops = model.config.num_tokens, 0.0
        self._begin(perf_counter())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self._image_flops:
            self._image_flops = step_flops(pl_module, batch) / len(batch["label"])
            self._begin(perf_counter())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._images += len(batch["label"])
        self._batch_end = now = perf_counter()
        if not is_log_step(trainer):
            return
        mine = self._images / (now - self._start)  # images per second of this device
        everywhere = mine * trainer.world_size
        values = {"images_per_second": everywhere, "tokens_per_second": everywhere * self._tokens}
        values["tflops"] = mine * self._image_flops / 1e12
        if self._peak:
            values["mfu"] = mine * self._image_flops / self._peak
        # Tensors of the CPU, because Lightning puts numbers on the GPU and waits for them there.
        pl_module.log_dict({f"speed/{name}": torch.tensor(value) for name, value in values.items()})
        self._begin(now)

    def on_validation_end(self, trainer, pl_module) -> None:
        self._start += perf_counter() - self._batch_end

    def _begin(self, now: float) -> None:
        self._start = self._batch_end = now
        self._images = 0


def _dtype(precision: str) -> torch.dtype:
    """In which a run's matrix products are computed."""
    if "bf16" in precision:
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32
