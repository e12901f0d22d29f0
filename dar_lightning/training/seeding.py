"""Randomness as a function of where training stands, so that a resumed run draws what the unbroken one would have."""

import os

import torch


def seed_batch(rank: int, batch: int) -> None:
    """Seed torch's global generators for one training batch.

    Args:
        rank: of this process: each rank draws its own noise, times and dropout.
        batch: number of this batch since the start of training.
    """
    run = int(os.environ.get("PL_GLOBAL_SEED", 0))  # what `seed_everything` chose
    # One multiplicative hash per part keeps neighbouring ranks, batches and seeds apart.
    torch.manual_seed((run * 0x9E3779B1 + rank * 0x85EBCA77 + batch * 0xC2B2AE3D) % 2**63)
