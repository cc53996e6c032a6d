"""The learning curve of a run as a PNG."""

import io
import math
from typing import Any

from matplotlib.figure import Figure


def learning_curve(lines: list[dict[str, Any]]) -> bytes:
    """Draw query loss and accuracy over the meta-steps.

    Args:
        lines: the log points of the run.

    Returns:
        The content of a PNG file.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in lines]
    losses = [line.get("loss") for line in lines]
    left.plot(steps, [math.nan if n is None else n for n in losses], color="tab:blue")
    left.set(xlabel="meta-step", ylabel="query loss")
    if any((loss or 0) > 0 for loss in losses):
        left.set(yscale="log")
    if any("accuracy" in line for line in lines):
        accuracy = percent(lines, "accuracy")
        right.plot(steps, accuracy, color="tab:blue", label="training tasks")
    checked = [line for line in lines if "validation_accuracy" in line]
    if checked:
        right.errorbar(
            [line["step"] for line in checked],
            percent(checked, "validation_accuracy"),
            yerr=percent(checked, "validation_interval"),
            color="tab:orange",
            marker="o",
            capsize=3,
            label="validation tasks (95 %)",
        )
        right.legend()
    right.set(xlabel="meta-step", ylabel="query accuracy, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()


def percent(lines: list[dict[str, Any]], key: str) -> list[float]:
    """One metric of every log point in percent; NaN, which leaves a gap, where it has no value.

    Example:
        >>> percent([{"accuracy": 0.5}, {"accuracy": None}], "accuracy")
        [50.0, nan]
    """
    found = [line.get(key) for line in lines]
    return [math.nan if value is None else 100 * value for value in found]
