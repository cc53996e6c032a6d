"""Pictures without a display."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator


@contextmanager
def panels(
    path: Path, count: int = 1, columns: int = 1, size: tuple[float, float] = (7.0, 4.5)
) -> Iterator[list[Axes]]:
    """Axes to draw on, written to a file at the end.

    Args:
        path: of the picture.
        count: of panels.
        columns: of panels, filled row by row.
        size: inches of one panel.

    Yields:
        The panels, each with a grid.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes[:count]:
        panel.grid(alpha=0.3)
    for panel in axes[count:]:
        panel.set_visible(False)
    yield axes[:count]
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    print(f"picture in {path}")


def plain_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Mark a logarithmic axis at these values, written as they are: 2, not 2 times ten to the 0."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(values)
