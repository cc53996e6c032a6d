"""The page's charts, drawn by matplotlib as SVG in the colours of the style sheet and as PNG."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memmeta.meta._evaluation import Interval
from memmeta.runs.report._judge import Judged

# matplotlib cannot draw in CSS variables, so these colours stand for --ink, --grid and --run-0 to
# --run-5 of the page's style sheet, and `in_page_colours` replaces them in the SVG.
INK, GRID = "#1d2430", "#d8dce3"
RUNS = ("#2563c9", "#c2570c", "#17794f", "#a3307a", "#6a4bc4", "#5d6672")
COLOURS = {INK: "--ink", GRID: "--grid"} | {c: f"--run-{i}" for i, c in enumerate(RUNS)}
SIZE = (4.2, 2.7)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "memmeta",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 5),
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Chart:
    """One chart of the page.

    Attributes:
        name: the name of its PNG file, without the suffix.
        title: the heading above it.
        note: one or two sentences on how to read it.
        svg: the drawing, in the colours of the style sheet.
        png: the same drawing in fixed colours.
    """

    name: str
    title: str
    note: str
    svg: str
    png: bytes


def drawn(
    name: str, title: str, note: str, draw: Callable[[Axes], None], size: Any = SIZE
) -> Chart:
    """Make a chart with a function that draws on matplotlib axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, dpi=150, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Chart(name, title, note, in_page_colours(svg.getvalue(), name), png.getvalue())


def in_page_colours(svg: str, name: str) -> str:
    """Prepare an SVG for a page: no prologue, ids that are unique, and the page's colours.

    Example:
        >>> svg = '<?xml?><svg width="3pt" height="2pt"><g id="a" fill="#1d2430"/></svg>'
        >>> in_page_colours(svg, "loss")
        '<svg role="img" ><g id="loss-a" fill="var(--ink)"/></svg>'
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg (.*?)width="[^"]*"', r"<svg \1", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' height="[^"]*pt"', "", svg, count=1)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("'DejaVu Sans'", "system-ui").replace("<svg ", '<svg role="img" ', 1)


def points(
    lines: Sequence[dict[str, Any]], key: str, scale: float = 1.0
) -> tuple[list[int], list[float]]:
    """The meta-steps and scaled values of one metric, at the log points that have it.

    Example:
        >>> lines = [{"step": 1, "error_bound": 160.0, "gradient_norm": 320.0}]
        >>> lines += [{"step": 2, "error_bound": 1.0, "gradient_norm": 0.0}, {"step": 3}]
        >>> points(lines, "error_bound"), points(lines, "gradient_norm")
        (([1], [0.5]), ([1, 2], [320.0, 0.0]))
    """
    known = [(line["step"], value) for line in lines if (value := _value(line, key)) is not None]
    return [step for step, _ in known], [scale * value for _, value in known]


def _value(line: dict[str, Any], key: str) -> float | None:
    """A metric of a log point; an error as a share of the meta-gradient's length."""
    found: float | None = line.get(key)
    if found is None or key not in ERRORS:
        return found
    length = line.get("gradient_norm") or 0.0
    return found / length if length > 0 else None


def over_steps(
    runs: Sequence[Judged], name: str, title: str, note: str, log: bool = True
) -> Chart | None:
    """A chart of one metric over the meta-steps, for the runs that have it; None if none has.

    Runs whose metric is always zero are left out, because their method has no such metric (such as
    the residual of a method without a linear system).
    """
    series = [(number, *points(run.lines, name)) for number, run in enumerate(runs)]
    series = [(number, steps, found) for number, steps, found in series if any(found)]
    values = [value for _, _, found in series for value in found]
    if not values:
        return None

    def draw(axes: Axes) -> None:
        for number, steps, found in series:
            axes.plot(steps, found, **look(number, len(steps)))
        if log and min(values) <= 0:
            axes.set_yscale("symlog", linthresh=_smallest(values))
            axes.axhline(0, color=INK, linewidth=0.8)
        elif log and (max(values) > 10 * min(values) or max(values) < 1e-3):
            axes.set_yscale("log")
        elif not log:
            axes.set_ylim(0, 1.08 * max(values))
        in_meta_steps(axes)

    return drawn(name, title, note, draw)


def in_meta_steps(axes: Axes) -> None:
    """Label the horizontal axis as meta-steps, with whole numbers only."""
    axes.set_xlabel("meta-step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def look(number: int, length: int = 0) -> dict[str, Any]:
    """The colour and line style of a run; with a marker if the line has only one point."""
    style = ("-", "--", ":")[number // len(RUNS) % 3]
    marker = "o" if length == 1 else None
    return {"color": RUNS[number % len(RUNS)], "linestyle": style, "marker": marker}


def accuracy(runs: Sequence[Judged]) -> Chart | None:
    """Accuracy on training tasks as lines, and on validation tasks with 95 % intervals."""
    if not any("accuracy" in line for run in runs for line in run.lines):
        return None

    def draw(axes: Axes) -> None:
        for number, run in enumerate(runs):
            steps, found = points(run.lines, "accuracy", 100)
            axes.plot(steps, found, **look(number, len(steps)), alpha=0.45)
            steps, means = points(run.lines, "validation_accuracy", 100)
            _, widths = points(run.lines, "validation_interval", 100)
            axes.errorbar(
                steps,
                means,
                yerr=widths,
                fmt="o",
                markersize=4,
                capsize=3,
                color=look(number)["color"],
            )
        in_meta_steps(axes)
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.set_ylim(top=min(axes.get_ylim()[1], 101))

    note = "Line: training tasks. Points: validation tasks, with their 95 % interval."
    return drawn("accuracy", "Query accuracy", note, draw)


def groups(runs: Sequence[Judged], episodes: int) -> Chart | None:
    """A chart of the test accuracy of each group of classes; None without groups."""
    names = list(dict.fromkeys(name for run in runs for name in run.groups))
    if not names:
        return None

    def draw(axes: Axes) -> None:
        for number, run in enumerate(runs):
            shift = 0.6 * ((number + 0.5) / len(runs) - 0.5)
            rows = [row for row, name in enumerate(names) if name in run.groups]
            found: list[Interval] = [run.groups[names[row]] for row in rows]
            axes.errorbar(
                [100 * interval.mean for interval in found],
                [row + shift for row in rows],
                xerr=[100 * interval.half_width for interval in found],
                fmt="o",
                markersize=5,
                capsize=3,
                color=look(number)["color"],
            )
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.xaxis.set_major_formatter("{x:g} %")
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlim(right=min(axes.get_xlim()[1], 101))

    note = f"{episodes} test episodes drawn from each group alone; 95 % intervals."
    tall = (SIZE[0], max(SIZE[1], 0.7 + len(names) * (0.2 + 0.1 * len(runs))))
    return drawn("groups", "Test accuracy by group", note, draw, tall)


def memory(runs: Sequence[Judged]) -> Chart | None:
    """The temporary memory of each run's compiled program; None if no run's report has it."""
    finals = [run.final for run in runs]
    found = [(final["meta_step_temporary_bytes"] or 0) / 1e6 if final else 0.0 for final in finals]
    if not any(found):
        return None

    def draw(axes: Axes) -> None:
        colours = [look(number)["color"] for number in range(len(runs))]
        bars = axes.barh(range(len(runs)), found, 0.6, color=colours)
        axes.bar_label(bars, [f"{size:.4g} MB" if size else "" for size in found], padding=4)
        axes.margins(x=0.25)
        axes.set_yticks([])
        axes.set_ylim(len(runs) - 0.4, -0.6)
        axes.set_xlabel("MB")

    note = "Temporary memory of one compiled block of meta-steps, as the compiler planned it."
    size = (SIZE[0], 1.0 + 0.4 * len(runs))
    return drawn("memory", "Memory", note, draw, size)


def health(runs: Sequence[Judged]) -> list[Chart]:
    """Charts of the metrics that show how far the hypergradients could be trusted."""
    found = [over_steps(runs, *words) for words in HEALTH]
    return [chart for chart in found if chart is not None]


ERRORS = ("error_estimate", "error_bound")
HEALTH = (
    (
        "inner_gradient_norm",
        "Inner gradient ‖∇g‖",
        "Where the inner loop ends. Near zero: it has converged.",
        True,
    ),
    (
        "linear_residual",
        "Linear residual",
        "Share of the right-hand side that the linear solver left over. Above 0.1: more steps, "
        "or a ridge.",
        True,
    ),
    (
        "smallest_curvature",
        "Smallest curvature met",
        "Of the inner Hessian. Zero or negative: no strict minimum, and the implicit function "
        "theorem does not hold.",
        True,
    ),
    (
        "error_estimate",
        "Estimated error over the meta-gradient's length",
        "Mean over tasks; of linear heads the error in feature space. Above 1: as long as the "
        "meta-gradient itself.",
        True,
    ),
    (
        "error_bound",
        "Bound on the error over the meta-gradient's length",
        "Rigorous, mean over tasks; of linear heads of the error in feature space.",
        True,
    ),
    ("inner_steps", "Inner steps made", "Fewer than asked for where a tolerance was met.", False),
    (
        "linear_iterations",
        "Hessian-vector products a task",
        "What the linear solver really used.",
        False,
    ),
    ("masked", "Tasks left out", "Not finite; between two log points.", False),
    ("indefinite", "Tasks without a minimum", "Curvature zero or negative.", False),
    ("diverging", "Inner loops that diverged", "Their gradient grew tenfold or more.", False),
    ("refused", "Updates left out", "Meta-gradients far longer than usual.", False),
    (
        "gradient_norm",
        "Meta-gradient norm",
        "Of the mean over the tasks of a meta-step.",
        True,
    ),
)


def charts(runs: Sequence[Judged], episodes: int) -> dict[str, list[Chart]]:
    """Every chart of the page, by section."""
    learning = [
        over_steps(runs, "loss", "Query loss", "On training tasks, after adaptation."),
        accuracy(runs),
        groups(runs, episodes),
    ]
    cost = [
        over_steps(runs, "tasks_per_second", "Tasks a second", "Between two log points.", False),
        memory(runs),
    ]
    return {
        "Learning": [chart for chart in learning if chart is not None],
        "Health of the solver": health(runs),
        "Time and memory": [chart for chart in cost if chart is not None],
    }


def _smallest(values: Sequence[float]) -> float:
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return min(sizes, default=1.0)
