"""Line charts, drawn with Pillow alone: TensorBoard has no picture of a curve over anything but steps."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 720, 360  # pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 32, 40  # margins around the plot
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def nice_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """At most `most` round numbers, equally spaced (1, 2 or 5 times a power of ten), that lie in [low, high]."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)][:most]


def line_chart(curves: Mapping[str, Sequence[float]], x_label: str) -> Image.Image:
    """Draw curves over 0, 1, 2, ... on white, with axes, ticks and a legend.

    Args:
        curves: name -> values; a value that is not finite interrupts its curve.
        x_label: what is counted on the horizontal axis.
    """
    finite = [value for values in curves.values() for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-6 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    margin = 0.05 * (high - low)
    low, high = low - margin, high + margin
    last = max(1, *(len(values) - 1 for values in curves.values()))
    font = ImageFont.load_default(13)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / last * (right - LEFT), bottom - (y - low) / (high - low) * (bottom - TOP)

    for tick in nice_ticks(low, high):
        y = place(0, tick)[1]
        draw.line([(LEFT, y), (right, y)], fill="#dddddd")
        draw.text((LEFT - 6, y), f"{tick:.4g}", fill="black", font=font, anchor="rm")
    for tick in nice_ticks(0, last, 9):
        x = place(tick, low)[0]
        draw.line([(x, bottom), (x, bottom + 4)], fill="black")
        draw.text((x, bottom + 6), f"{tick:.4g}", fill="black", font=font, anchor="mt")
    draw.line([(LEFT, TOP), (LEFT, bottom), (right, bottom)], fill="black")
    draw.text(((LEFT + right) / 2, HEIGHT - 4), x_label, fill="black", font=font, anchor="mb")
    legend = LEFT
    for (name, values), color in zip(curves.items(), COLORS, strict=False):
        for i in range(len(values) - 1):
            if math.isfinite(values[i]) and math.isfinite(values[i + 1]):
                draw.line([place(i, values[i]), place(i + 1, values[i + 1])], fill=color, width=2)
        draw.line([(legend, TOP / 2), (legend + 20, TOP / 2)], fill=color, width=2)
        draw.text((legend + 26, TOP / 2), name, fill="black", font=font, anchor="lm")
        legend += 46 + int(font.getlength(name))
    return image
