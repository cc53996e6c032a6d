"""The picture of one episode before and after adaptation."""

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from memmeta.runs.report._judge import Episode

SHOWN = 3  # query examples of each class
RIGHT, WRONG, INK, PAPER = "#17794f", "#c2570c", "#1d2430", "white"


def picture(episode: Episode, ways: int) -> bytes:
    """Draw a task: a row a class, its first support example, then query examples.

    Above each query example stands the class that the learner says before adaptation and after it,
    with the probability; the frame is green where it is right afterwards.

    Args:
        episode: the task with the learner's predictions.
        ways: the number of classes.

    Returns:
        A PNG.
    """
    task = episode.task
    figure = Figure(figsize=(1.3 * (SHOWN + 1), 1.45 * ways), layout="constrained")
    figure.patch.set_facecolor(PAPER)
    axes = figure.subplots(ways, SHOWN + 1, squeeze=False)
    for way, row in enumerate(axes):
        support = np.flatnonzero(task.support_targets == way)[0]
        _example(row[0], task.support_inputs[support], f"{_class(way)}", INK)
        for panel, query in zip(row[1:], np.flatnonzero(task.query_targets == way), strict=False):
            before, after = episode.before[query], episode.after[query]
            right = after.argmax() == way
            said = f"{_said(before)} → {_said(after)}"
            _example(panel, task.query_inputs[query], said, RIGHT if right else WRONG)
        for panel in row[1 + int((task.query_targets == way).sum()) :]:
            panel.set_visible(False)
    scores = [
        100 * float(np.mean(found.argmax(axis=1) == task.query_targets))
        for found in (episode.before, episode.after)
    ]
    figure.suptitle(
        f"{episode.group}: one example a class (left), then queries\n"
        f"before → after adaptation: {scores[0]:.0f} % → {scores[1]:.0f} % right",
        fontsize=9,
        color=INK,
    )
    png = io.BytesIO()
    figure.savefig(png, dpi=110, facecolor=PAPER)
    return png.getvalue()


def _example(panel: Any, image: Any, title: str, colour: str) -> None:
    pixels = np.asarray(image)
    shade = {"cmap": "gray"} if pixels.shape[-1] == 1 else {}
    panel.imshow(pixels[..., 0] if shade else pixels, **shade)
    panel.set_title(title, fontsize=8, color=colour)
    panel.set_xticks([])
    panel.set_yticks([])
    for side in panel.spines.values():
        side.set_color(colour)
        side.set_linewidth(2)


def _class(way: int) -> str:
    return chr(ord("A") + way) if way < 26 else str(way)


def _said(probabilities: Any) -> str:
    """The most probable class; "?" where all are equally probable."""
    if np.ptp(probabilities) < 1e-3:
        return "?"
    return f"{_class(int(probabilities.argmax()))} {100 * float(probabilities.max()):.0f} %"
