"""Throughput: images, tokens and FLOPs per second, MFU, and the share of time spent waiting for data."""

from time import perf_counter

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback

from dar_lightning.errors import UserError
from dar_lightning.training.flops import step_flops
from dar_lightning.training.log_step import is_log_step, log_numbers
from dar_lightning.training.module import TrainingModule

# Part of a GPU's name -> dense peaks in teraFLOP/s, of bfloat16, TF32 and float32, by its data sheet: where Lightning's
# table has none under the driver's name, or the twofold one of sparse matrices.
PEAKS = {"H200 NVL": (835.5, 417.5, 60), "H200": (989.5, 494.7, 67), "H100 NVL": (835.5, 417.5, 60)}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a device in FLOP/s, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    if peaks is None:
        return get_available_flops(device, dtype)
    low, tf32, exact = peaks
    rounded = tf32 if torch.get_float32_matmul_precision() != "highest" else exact
    return 1e12 * (rounded if dtype == torch.float32 else low)


class Throughput(Callback):
    """Logs speed, every `trainer.log_every_n_steps` steps, of the time since it was last logged, without validation.

    - `speed/images_per_second` (also as `data/images_per_second`), `speed/tokens_per_second`: of all devices together.
    - `speed/tflops`: teraFLOP/s of each device, of a forward and backward pass (`flops.step_flops`).
    - `speed/mfu`: the same as a share of the device's peak, 0 to 1, where the peak is known.
    - `data/wait_share`: part of the time in which training stood still because the next batch was not there; also in
      the progress bar. Our loaders measure it (`waited`): between two steps, loggers wait for the GPU, too.
    - `data/skipped`: distinct bad samples that all ranks had met when they last compared, and this one since.

    Nothing here waits for a GPU. Of several in one run, as where a monitor layer adds one to a recipe's, the last logs.

    Args:
        peak_tflops: peak of one device in teraFLOP/s, dense, in the precision of the run; None takes it from
            a table of GPUs.
        flops: count operations; without, `speed/tflops` and `speed/mfu` are left out. Counting takes two to ten seconds
            before the first step.
    """

    def __init__(self, peak_tflops: float | None = None, flops: bool = True):
        if peak_tflops is not None and peak_tflops <= 0:
            raise UserError(f"peak_tflops is {peak_tflops}: it must be positive, or null for the table's")
        self.peak_tflops, self.flops = peak_tflops, flops
        self._start = self._batch_end = 0.0  # seconds
        self._silent = False

    def setup(self, trainer, pl_module, stage: str) -> None:
        self._silent = self is not [found for found in trainer.callbacks if isinstance(found, Throughput)][-1]

    def on_train_start(self, trainer, pl_module) -> None:
        dtype = torch.bfloat16 if "bf16" in trainer.precision else torch.float32
        dtype = torch.float16 if trainer.precision.startswith("16") else dtype
        self._peak = (self.peak_tflops or 0) * 1e12 or peak_flops(pl_module.device, dtype)
        self._image_flops: float | None = None
        self._begin(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.flops and not self._silent and self._image_flops is None and isinstance(pl_module, TrainingModule):
            self._image_flops = step_flops(pl_module, batch) / len(batch["label"])
            self._begin(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._images += len(batch["label"])
        self._batch_end = perf_counter()
        if self._silent or not is_log_step(trainer):
            return
        seconds = self._batch_end - self._start
        mine = self._images / seconds  # images per second of this device
        values = dict.fromkeys(("speed/images_per_second", "data/images_per_second"), mine * trainer.world_size)
        if isinstance(pl_module, TrainingModule):
            values["speed/tokens_per_second"] = mine * trainer.world_size * pl_module.model.config.num_tokens
        if self._image_flops is not None:
            values["speed/tflops"] = mine * self._image_flops / 1e12
            if self._peak:
                values["speed/mfu"] = mine * self._image_flops / self._peak
        if hasattr(trainer.datamodule, "skipped"):
            values["data/skipped"] = sum(len(bad) for bad in trainer.datamodule.skipped.values())
        log_numbers(pl_module, values)
        if hasattr(trainer.train_dataloader, "waited"):
            share = (trainer.train_dataloader.waited - self._waited) / seconds
            log_numbers(pl_module, {"data/wait_share": share}, prog_bar=True)
        self._begin(trainer, self._batch_end)

    def on_validation_end(self, trainer, pl_module) -> None:
        self._start += perf_counter() - self._batch_end

    def _begin(self, trainer, now: float | None = None) -> None:
        self._start = self._batch_end = perf_counter() if now is None else now
        self._images, self._waited = 0, getattr(trainer.train_dataloader, "waited", 0.0)
