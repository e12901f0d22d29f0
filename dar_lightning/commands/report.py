"""`dar report`: a sweep's tables, plots and sample grids, and the sweep in TensorBoard."""

import shlex
from pathlib import Path

from dar_lightning.errors import begin_work
from dar_lightning.sweeps.plots import plot_curves, plot_groups, plot_metrics, plot_samples, save_plot
from dar_lightning.sweeps.results import read_sweep
from dar_lightning.sweeps.tables import summarize, write_tables
from dar_lightning.sweeps.tensorboard import write_tensorboard


def report(sweep: str, output: str | None = None) -> None:
    """Write `table.md`, `table.csv`, `runs.csv`, `figures.png`, `curves.png`, `groups.png` and `samples.jpg`.

    A sweep that has not ended is reported as far as it is; runs that failed or are to come are counted and named. A
    plot of which nothing was logged is left out. In the sweep's folder, `tensorboard/` is written:
    `tensorboard --logdir` of it shows the runs under their cells' names, a table of hyperparameters and charts with the
    curves of all cells.

    Args:
        sweep: folder that `dar sweep` wrote. May be given without `--sweep`, as the first word.
        output: folder to write to; left out, `report` in the sweep's.

    Raises:
        UserError: the folder is no sweep's, or its runs were measured by different protocols.
    """
    found = read_sweep(sweep)
    folder = found.folder / "report" if output is None else Path(output)
    rows = summarize(found)
    begin_work()
    print(write_tables(found, rows, folder))
    plots = {"figures.png": plot_metrics(found, rows), "curves.png": plot_curves(found)}
    plots |= {"groups.png": plot_groups(found), "samples.jpg": plot_samples(found)}
    for name, plot in plots.items():
        if plot is not None:
            save_plot(plot, folder / name)
    print(f"report in {folder}; curves: tensorboard --logdir {shlex.quote(str(write_tensorboard(found)))}")
