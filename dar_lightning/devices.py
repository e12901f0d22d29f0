"""Devices by name, dtypes, and torch's precision settings."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from dar_lightning.errors import UserError, require

Dtype = Literal["float32", "bfloat16"]  # of weights, by torch's name


def torch_dtype(name: Dtype | None) -> torch.dtype | None:
    """The dtype of that name; None, which leaves weights as they are stored, stays None."""
    return None if name is None else getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, without torch's."""
    return str(dtype).removeprefix("torch.")


def round_convolutions_as_products() -> None:
    """Let float32 convolutions on NVIDIA GPUs round to TF32's 10 bits where matrix products do, and nowhere else.

    Torch alone rounds convolutions always and products never. A setting of the process, which every `dar` begins with.
    """
    torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 matrix products without TF32 or bfloat16: a setting of the process, for one thread at a time."""
    newer = []
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch 2.9 and newer, where somebody has set fp32_precision of these two
        parts = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        newer = [(part, part.fp32_precision) for part in parts]
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if not newer:
            torch.set_float32_matmul_precision(before)
        for part, precision in newer:
            part.fp32_precision = precision


_found: list[bool] = []  # the setting that each thread within no_cudnn_attention has found
_lock = threading.Lock()


def kernel_settings() -> tuple:
    """Settings of the process that choose among CUDA's kernels: a graph holds those that it was captured with."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        precision = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # torch 2.9 and newer, where somebody has set fp32_precision of these
        precision = matmul.fp32_precision, cudnn.conv.fp32_precision
    reduced = matmul.allow_bf16_reduced_precision_reduction
    return *precision, reduced, torch.are_deterministic_algorithms_enabled(), cudnn.deterministic


@contextmanager
def no_cudnn_attention() -> Iterator[None]:
    """Attention without cuDNN, which would make and keep a plan for every sequence length, in each thread.

    A setting of the process. Threads may be inside together; the last to leave restores what was before.
    """
    with _lock:
        _found.append(torch.backends.cuda.cudnn_sdp_enabled())
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        with _lock:
            before = _found.pop()
            if not _found:
                torch.backends.cuda.enable_cudnn_sdp(before)


def choose_device(name: str = "auto") -> torch.device:
    """A device from its name.

    Args:
        name: auto (CUDA or ROCm if there is one, else the CPU; Apple's mps lacks some operations), cpu, cuda, cuda:N,
            mps, or gpu (cuda or mps).

    Raises:
        UserError: the name is none of these, or this machine has no such device.
    """
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = "cuda" if count["cuda"] else "cpu"
    elif name == "gpu":
        require(count["cuda"] or count["mps"], "device: gpu, but torch finds no GPU here; use cpu or auto")
        name = "cuda" if count["cuda"] else "mps"
    try:
        device = torch.device(name)
        there = count[device.type]
    except (RuntimeError, KeyError) as error:
        raise UserError(f"device: {name} is none; give auto, cpu, cuda, cuda:N or mps") from error
    found = f"torch finds {there} {device.type} device(s) here"
    require((device.index or 0) < there, f"device: {name}, but {found}; use auto")
    return device


LAUNCHERS = {  # variable with the number of processes that a launcher has started -> its name
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "WORLD_SIZE": "torchrun",
}


def check_srun() -> None:
    """Refuse to run where SLURM has several tasks, and srun has not started this process as one of them.

    Lightning takes it for one all the same: it would wait for the others without end, or not find its own number.

    Raises:
        UserError: it is so. torchrun's processes, and those of an interactive job, are not meant.
    """
    if _lightning_sees_slurm() and "SLURM_STEP_NUM_TASKS" not in os.environ:
        tasks = os.environ["SLURM_NTASKS"]
        if tasks != "1" or "SLURM_PROCID" not in os.environ:  # a shell of salloc has no number
            raise UserError(
                f"SLURM_NTASKS is {tasks}, but srun has not started this process: write srun before dar; or "
                "`unset SLURM_NTASKS`, and dar starts the processes of this machine itself"
            )


def _lightning_sees_slurm() -> bool:
    terminal = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not terminal and "TORCHELASTIC_RUN_ID" not in os.environ


def check_started_processes(world_size: int, options: str, slurm: bool = True) -> None:
    """Refuse a run of `world_size` processes when a launcher has started another number of them.

    More would each be a run of its own; under SLURM, with one task, Lightning would make the run that small.

    Args:
        world_size: processes of this run, as its options say.
        options: those that decide it, for the error line.
        slurm: whether Lightning goes by SLURM's word, where it finds that.

    Raises:
        UserError: srun (tasks of this step), mpirun or torchrun started another number of them.
    """
    for variable, launcher in LAUNCHERS.items():
        started = os.environ.get(variable, "1")
        if variable == "WORLD_SIZE" and "TORCHELASTIC_RUN_ID" not in os.environ:
            continue
        if launcher == "srun" and os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):  # a terminal is one
            continue
        if started.isdecimal() and int(started) > 1 and int(started) != world_size:
            raise UserError(
                f"{options} make {world_size} process(es), {launcher} has started {started}: each would be a run of "
                f"its own; let both say the same"
            )
        if slurm and launcher == "srun" and started == "1" != str(world_size) and _lightning_sees_slurm():
            raise UserError(
                f"{options} make {world_size} processes, SLURM has started 1: write srun with as many tasks before "
                "dar; or `unset SLURM_NTASKS`, and dar starts them itself"
            )
