"""A finished sweep, read back: its runs, their curves, tables and plots."""

from dar_lightning.report.curves import read_scalars
from dar_lightning.report.results import Cell, Results, Run, Stage, read_sweep

__all__ = ["Cell", "Results", "Run", "Stage", "read_scalars", "read_sweep"]
