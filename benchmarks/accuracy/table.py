"""Lines of results, and the table and the picture that are made from them alone."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.accuracy.published import PUBLISHED, sources
from benchmarks.accuracy.runs import BASELINE, Record
from benchmarks.accuracy.settings import Setting
from benchmarks.harness import pictures

KINDS = {"tuned": "", "authors": ", as the authors ran it", "same_inner": ", same inner loop"}
DIGITS = {100.0: 1, 1.0: 3}  # of an accuracy in %, and of an error
STATISTICS = ("as trained", "support")  # of batch norm at test
IDENTITY = ("data", "ways", "shots", "method", "preset", "split", "seed", "sizes")


def read(path: Path) -> list[Record]:
    """The finished results; a last line that was cut off is passed over.

    Raises:
        ValueError: another line is no JSON.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: expected JSON, found {line!r}") from error
    return found


def append(path: Path, record: Record) -> None:
    """Add a result; a last line that was cut off makes room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def identity(record: Record) -> Record:
    """What a result is of."""
    return {name: record[name] for name in IDENTITY}


def of_any_seed(found: Record) -> str:
    """What the seeds of one method, setting and preset have in common, as text."""
    return json.dumps([found[name] for name in IDENTITY if name != "seed"], sort_keys=True)


def setting_of(record: Record) -> Setting:
    """The kind of task of a result."""
    return Setting(record["data"], record["ways"], record["shots"])


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """The seeds of each method, setting and preset, in the order they were run."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(of_any_seed(record), []).append(record)
    return list(found.values())


def best(group: Sequence[Record]) -> float:
    """What methods are ordered by: the first column of figures."""
    return float(np.mean([_first(record)["mean"] for record in group]))


def _first(record: Record) -> dict[str, float]:
    by_steps = figures_of(record)[STATISTICS[0]]
    return next(iter(by_steps.values()))


def figures_of(record: Record) -> dict[str, dict[str, dict[str, float]]]:
    """A result's figures, by `STATISTICS`: training is by other statistics than the support's."""
    figures = record["figures"].items()
    return {STATISTICS[kind == "support"]: found for kind, found in figures}


def summary(figures: Sequence[dict[str, float]], scale: float) -> str:
    """Mean over seeds ± the 95 % interval over tasks."""
    mean = scale * np.mean([figure["mean"] for figure in figures])
    width = scale * np.mean([figure["half_width"] for figure in figures])
    digits = DIGITS[scale]
    return f"{mean:.{digits}f} ± {width:.{digits}f}"


def seeds(group: Sequence[Record], scale: float) -> str:
    """How many, and from what to what the first figure goes."""
    if len(group) == 1:
        return "1"
    means = [scale * _first(record)["mean"] for record in group]
    digits = DIGITS[scale]
    return f"{len(group)} ({min(means):.{digits}f}–{max(means):.{digits}f})"


def cases(records: Sequence[Record]) -> dict[str, list[Record]]:
    """What can be compared, by its title: one kind of task, as many seconds of training."""
    found: dict[tuple[Setting, float], list[Record]] = {}
    for record in records:
        case = (setting_of(record), record["sizes"]["seconds"])
        found.setdefault(case, []).append(record)
    times = Counter(setting for setting, _ in found)
    return {
        f"{setting}, {seconds:g} s" if times[setting] > 1 else str(setting): of_case
        for (setting, seconds), of_case in sorted(found.items(), key=lambda case: case[0])
    }


def table(records: Sequence[Record]) -> str:
    """One table a case, in Markdown, the best method first."""
    return "\n".join(_one_table(title, found) for title, found in cases(records).items())


def _one_table(title: str, records: Sequence[Record]) -> str:
    setting = setting_of(records[0])
    kinds = STATISTICS[:1] if setting.curves else STATISTICS
    stages = [f"{kind}, {steps}" for kind in kinds for steps in ("T", "2 T")]
    columns = ["method", *(["T", "2 T"] if setting.curves else stages)]
    columns += ["steps (T)", "meta-steps", "seconds", "MB", "seeds"]
    by_best = sorted(groups(records), key=best, reverse=not setting.curves)
    rows = [_row(group, kinds) for group in by_best]
    notes = []
    published = [PUBLISHED.get((setting, group[0]["method"])) for group in by_best]
    if any(published):
        columns.append("published")
        for row, found in zip(rows, published, strict=True):
            row.append(f"{found[0]} [{found[1]}]" if found else "")
        notes = ["", *sources({found[1] for found in published if found})]
    lines = [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]]
    return "\n".join([f"\n**{title}**: {_figure(setting)}\n", *lines, *notes])


def _figure(setting: Setting) -> str:
    return "error / variance" if setting.curves else "accuracy, %"


def _row(group: Sequence[Record], kinds: Sequence[str]) -> list[str]:
    first = group[0]
    cells = [first["method"] + KINDS[first["preset"]]]
    scale = 1.0 if setting_of(first).curves else 100.0
    for kind in kinds:
        by_steps = [list(figures_of(record)[kind].values()) for record in group]
        for stage in range(2):
            one_more = len(by_steps[0]) > stage
            cells.append(summary([f[stage] for f in by_steps], scale) if one_more else "–")
    if first["method"] == BASELINE:
        return [*cells, *["–"] * 5]
    seconds = f"{np.mean([record['seconds'] for record in group]):.1f}"
    cells += [next(iter(figures_of(first)[kinds[0]])), str(first["meta_steps"]), seconds]
    return [*cells, f"{first['temporary_megabytes']:.1f}", seeds(group, scale)]


def picture(records: Sequence[Record], path: Path) -> None:
    """One panel a case: every seed as a point, with its interval over tasks."""
    of_cases = cases(records)
    with pictures.panels(path, len(of_cases), columns=2, size=(7, 4.2)) as axes:
        for panel, (title, found) in zip(axes, of_cases.items(), strict=True):
            _panel(panel, title, found)


def _panel(panel: Any, title: str, records: Sequence[Record]) -> None:
    setting = setting_of(records[0])
    by_best = sorted(groups(records), key=best, reverse=setting.curves)
    names = [group[0]["method"] + KINDS[group[0]["preset"]] for group in by_best]
    for height, group in enumerate(by_best):
        for kind, colour in zip(STATISTICS, ("tab:blue", "tab:orange"), strict=True):
            _points(panel, height, kind, colour, group)
    panel.set(title=title, yticks=range(len(names)), yticklabels=names, xlabel=_figure(setting))
    if setting.curves:
        panel.set(xscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.legend(title="batch statistics at test", fontsize=7)


def _points(panel: Any, height: int, kind: str, colour: str, group: Sequence[Record]) -> None:
    """The seeds of one method, one below another; the first method's have a label."""
    curves = setting_of(group[0]).curves
    scale = 1.0 if curves else 100.0
    for seed, record in enumerate(group):
        if kind in (figures := figures_of(record)):
            found = next(iter(figures[kind].values()))
            panel.errorbar(
                scale * found["mean"],
                height + 0.12 * (seed - (len(group) - 1) / 2),
                xerr=scale * found["half_width"],
                fmt=".",
                color=colour,
                label=kind if height == seed == 0 and not curves else None,
            )
