"""Line charts: a curve's pixels are where its values are."""

import math

import numpy as np
import pytest

from dar_lightning.training.callbacks.charts import (
    BOTTOM,
    COLORS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    line_chart,
    nice_ticks,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3.2, 9.7, [4, 5, 6, 7, 8, 9]),
        (-0.02, 0.04, [-0.02, -0.01, 0, 0.01, 0.02, 0.03, 0.04]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


def rows_of(chart, color: str, column: int) -> np.ndarray:
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return np.flatnonzero((np.array(chart)[TOP:, column] == rgb).all(-1)) + TOP


def test_a_curve_goes_through_its_values():
    """Values 0 to 10 with a margin of 5%: the axis runs from -0.5 to 10.5."""
    values = [0.0, 10.0, 5.0, math.nan, 5.0]
    chart = line_chart({"one": values, "two": [10.0] * 5}, x_label="token")
    assert chart.size == (WIDTH, HEIGHT)
    plot_height, plot_width = HEIGHT - BOTTOM - TOP, WIDTH - RIGHT - LEFT
    for number, value in ((1, 10.0), (2, 5.0)):
        rows = rows_of(chart, COLORS[0], round(LEFT + number / 4 * plot_width) - 3)
        expected = HEIGHT - BOTTOM - (value + 0.5) / 11 * plot_height
        assert abs(rows.mean() - expected) < 5
    assert len(rows_of(chart, COLORS[0], round(LEFT + 2.5 / 4 * plot_width))) == 0, "a gap at what is not finite"
    assert len(rows_of(chart, COLORS[1], round(LEFT + 2.5 / 4 * plot_width))) > 0


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0], [math.nan, math.inf]])
def test_curves_without_a_range_are_drawn(values):
    assert line_chart({"flat": values}, x_label="token").size == (WIDTH, HEIGHT)
