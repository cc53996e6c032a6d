"""The progress of a run, shown to the user, and its final report.

A terminal or a notebook gets a bar that is redrawn in place, a log file gets plain lines.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from memmeta.runs._records import Row

console = Console(highlight=False, markup=False)  # brackets in names of files are not markup


def describe(line: dict[str, Any]) -> str:
    """Format a log point as text, with its "trouble" (see `memmeta.explain`) if there is any.

    Example:
        >>> describe({"step": 20, "loss": 0.5, "accuracy": 0.9, "tasks_per_second": 31.0})
        'query loss 0.500, accuracy 90.0 %, 31 tasks/s'
    """
    parts = [f"query loss {line['loss']:.3f}"]
    if "accuracy" in line:
        parts.append(f"accuracy {100 * line['accuracy']:.1f} %")
    parts.append(f"{line['tasks_per_second']:.0f} tasks/s")
    if "trouble" in line:
        parts.append(line["trouble"].rstrip("."))
    if "validation_accuracy" in line:
        accuracy, interval = line["validation_accuracy"], line["validation_interval"]
        parts.append(f"validation {100 * accuracy:.1f} ± {100 * interval:.1f} %")
    return ", ".join(parts)


@contextmanager
def data_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on the terminal, if there is one, while data are converted or checked."""
    terminal = Console(stderr=True, markup=False)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task(escape_markup(what), total=total)
        yield lambda number: progress.update(task, advance=number)


@contextmanager
def shown(meta_steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show log points as they come, in a terminal, a notebook or a log file.

    Args:
        meta_steps: the number of meta-steps of the whole run.

    Yields:
        The function to call with each log point.
    """
    if console.is_jupyter:
        yield _in_notebook(meta_steps)
        return
    if not console.is_terminal:
        yield lambda line: console.print(
            f"meta-step {line['step']}/{meta_steps}: {describe(line)}", soft_wrap=True
        )
        return
    columns = (
        TextColumn("meta-steps"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=meta_steps)

        def show(line: dict[str, Any]) -> None:
            progress.update(bar, completed=line["step"], description=describe(line))
            if "validation_accuracy" in line:
                progress.console.print(f"meta-step {line['step']}: {describe(line)}")

        yield show


def _in_notebook(meta_steps: int) -> Callable[[dict[str, Any]], None]:
    """A function that redraws the running cell's output with each log point; needs IPython only."""
    from IPython.display import display

    validations: list[str] = []

    def drawn(step: int, text: str) -> dict[str, str]:
        bar = f'<progress value="{step}" max="{meta_steps}"></progress> {step}/{meta_steps}'
        rows = "<br>".join([f"{bar} {escape(text)}", *map(escape, validations)])
        plain = "\n".join([f"meta-step {step}/{meta_steps}: {text}", *validations])
        return {"text/html": rows, "text/plain": plain}

    handle = display(drawn(0, "compiling"), raw=True, display_id=True)

    def show(line: dict[str, Any]) -> None:
        if "validation_accuracy" in line:
            validations.append(f"meta-step {line['step']}: {describe(line)}")
        handle.update(drawn(line["step"], describe(line)), raw=True)

    return show


def print_comparison(rows: list[Row]) -> None:
    """Print runs on the same episodes as a table."""
    table = Table(title=f"{rows[0].episodes} test episodes, 95 % intervals", title_justify="left")
    for name in ("run", "method", "accuracy, %", f"minus {rows[0].name}, %"):
        table.add_column(name, justify="right" if "%" in name else "left")
    for row in rows:
        figures = [
            "" if found is None else f"{100 * found.mean:+.2f} ± {100 * found.half_width:.2f}"
            for found in (row.accuracy, row.difference)
        ]
        table.add_row(row.name, row.method, figures[0].lstrip("+"), figures[1])
    console.print(table)


def print_report(report: dict[str, Any]) -> None:
    """Print the final report as a table."""
    shots, ways = report["shots"], report["ways"]
    title = f"{report['method']} on {report['data']}, {ways}-way {shots}-shot"
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, found in report["accuracy"].items():
        value = f"{100 * found['mean']:.2f} ± {100 * found['interval']:.2f} %"
        table.add_row(f"test accuracy, {name} ({report['episodes']} episodes, 95 %)", value)
    table.add_row("meta-steps", str(report["meta_steps"]))
    if report["meta_steps_per_second"] is not None:
        table.add_row("meta-steps a second (median)", f"{report['meta_steps_per_second']:.2f}")
    if report["meta_step_temporary_bytes"] is not None:
        megabytes = report["meta_step_temporary_bytes"] / 1e6
        table.add_row("memory of the compiled meta-step", f"{megabytes:.1f} MB")
    console.print(table)
