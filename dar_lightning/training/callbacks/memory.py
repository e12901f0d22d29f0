"""Monitor of CPU and GPU memory."""

import resource
import sys

import torch
from lightning.pytorch import Callback

from dar_lightning.training.log_step import is_log_step, log_numbers

GIB = 2**30


class Memory(Callback):
    """Logs memory of this process in GiB, every `trainer.log_every_n_steps` steps. Neither number waits for a GPU.

    - `memory/device_peak`: most that tensors took on the GPU since it was last logged.
    - `memory/host_peak`: most of the host's memory that was ever resident, data workers not included.
    """

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not is_log_step(trainer):
            return
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        values = {"memory/host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
        if pl_module.device.type == "cuda":
            values["memory/device_peak"] = torch.cuda.max_memory_allocated(pl_module.device) / GIB
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        log_numbers(pl_module, values)
