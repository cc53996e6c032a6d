"""From the figures of all parts: the aims, one table in Markdown, one picture."""

from collections.abc import Callable, Iterator
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

from benchmarks.harness.tables import Row

Results = dict[str, Any]
UNMEASURED = "unmeasured"


def rows_of(results: Results, part: str) -> list[Row]:
    """The rows of a part that have figures."""
    found = results["parts"].get(part, {}).get("rows", [])
    return [row for row in found if "said" not in row or "compiled MB" in row]


def on_a_chip(results: Results) -> bool:
    """Whether the figures are of an accelerator at full size."""
    return not results["quick"] and results["machine"].get("platform", "cpu") != "cpu"


def line(what: str, wanted: str, found: float | None, holds: Callable[[float], bool]) -> Row:
    """One aim; without a figure it is unmeasured."""
    verdict = UNMEASURED if found is None else "holds" if holds(found) else "MISSED"
    return {"what": what, "aim": wanted, "found": "" if found is None else found, "": verdict}


def aims(results: Results) -> list[Row]:
    """All aims: those of a chip's memory and time are unmeasured on a CPU and in a quick run."""
    lines = [*of_memory(results), *of_peers(results), *of_matrix_units(results), *of_auto(results)]
    if not on_a_chip(results):
        lines = [each | {"found": "", "": UNMEASURED} for each in lines]
    return [*lines, *of_all(results)]


def of_memory(results: Results) -> Iterator[Row]:
    """Peak at the largest T over that at T = 1."""
    for method in ("memory_reduced", "imaml"):
        here = {
            row["T"]: row["peak MB"]
            for row in rows_of(results, "memory")
            if row["method"] == method and row["peak MB"] is not None
        }
        ratio = here[max(here)] / here[1] if len(here) > 1 and 1 in here else None
        yield line(f"{method}: memory at T = 1000 over T = 1", "1.00", ratio, lambda r: r <= 1.005)


def of_peers(results: Results) -> Iterator[Row]:
    """Plain PyTorch's loop over tasks, over ours; where both found the same."""
    for part in ("peers", "peers, TF32"):
        products = "TF32" if "TF32" in part else "float32"
        for case in ("a:maml:5", "b32:memory_reduced:20"):
            ratio = None
            for row in rows_of(results, part):
                if (row["case"], row["who"], row["same"]) == (case, "PyTorch", "yes"):
                    ratio = row["over ours"]
            what = f"{case}, {products}: PyTorch's loop over tasks, over ours"
            yield line(what, "≥ 3", ratio, lambda r: r >= 3)


def of_matrix_units(results: Results) -> Iterator[Row]:
    """b84 in bfloat16 over the published peak, or the best product where none is known."""
    peaks = {row["precision"]: row for row in rows_of(results, "products")}
    rate = {row["precision"]: row.get("TFLOP/s") for row in rows_of(results, "precision")}
    alone = [row["TFLOP/s"] for row in rows_of(results, "convolutions") if row["block"] == "all"]
    peak = peaks.get("bfloat16", {})
    top = peak.get("published") or peak.get("TFLOP/s")
    found = rate.get("bfloat16")
    share = found / top if found and top else None
    of = "published peak" if peak.get("published") else "best product"
    yield line(f"b84, bfloat16, over the {of}", "≥ 0.40", share, lambda r: r >= 0.4)
    bound = alone[0] / top if alone and top else None
    reason = f"its convolutions alone over the {of}: what bounds it"
    yield line(reason, "", bound, lambda r: True)


def of_auto(results: Results) -> Iterator[Row]:
    """Seconds with "auto" over those with the fastest chunk."""
    cases: dict[tuple, dict[Any, float]] = {}
    for row in rows_of(results, "chunks"):
        cases.setdefault((row["workload"], row["method"]), {})[row["chunk"]] = row["s"]
    for (workload, method), seconds in cases.items():
        ratio = seconds["auto"] / min(seconds.values()) if "auto" in seconds else None
        what = f'{workload}, {method}: "auto" over the fastest of {len(seconds)} chunks'
        yield line(what, "≤ 1.1", ratio, lambda r: r <= 1.1)


def of_all(results: Results) -> Iterator[Row]:
    """What must hold on every platform: estimators and messages."""
    for part, what in (
        ("conformance", "estimators within float32 of an answer from elsewhere"),
        ("messages", "methods with one all-reduce a meta-step; on one device none"),
        ("messages, simulated", "the same on eight simulated devices"),
    ):
        rows = results["parts"].get(part, {}).get("rows", [])
        held = float(sum(row[""] == "holds" for row in rows)) if rows else None
        yield line(what, f"all of {len(rows)}", held, partial(eq, len(rows)))


def cell(value: Any) -> str:
    """A figure with four digits; nothing for what was not measured."""
    if value is None:
        return "not given"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def markdown(rows: list[Row]) -> str:
    """A table whose columns are those of all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[cell(row.get(name, "")) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(each) + " |" for each in lines)


def table(results: Results, titles: dict[str, str]) -> str:
    """Where it was measured, the aims, then the rows of every part."""
    machine = results["machine"]
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = ["*Quick: small sizes.*\n"] if results["quick"] else []
    parts += [f"{where}\n", f"**Aims**\n\n{markdown(aims(results))}\n"]
    for name, each in results["parts"].items():
        said = f"{each['said']}\n" if each["said"] else ""
        rows = markdown(each["rows"]) + "\n" if each["rows"] else ""
        parts.append(f"**{titles[name]}** ({each['seconds']} s)\n\n{rows}{said}")
    return "\n".join(parts)


def picture(results: Results, path: Path) -> None:
    """Memory and seconds against T, seconds against tasks, and PyTorch over ours."""
    from benchmarks.harness import pictures

    kind = results["machine"].get("device", "")
    size = "small sizes, nothing to compare" if results["quick"] else "full size"
    scaling, memory = rows_of(results, "scaling"), rows_of(results, "memory")
    by_steps = [row for row in scaling if row["tasks"] == scaling[-1]["tasks"]]
    by_tasks = [row for row in scaling if row["T"] == scaling[0]["T"]]
    figure = "peak MB" if any(row["peak MB"] is not None for row in memory) else "compiled MB"
    lines = (
        (figure.replace("peak", "peak, by the device:"), "inner steps T", "T", figure, memory),
        ("s a meta-step", "inner steps T", "T", "s", by_steps),
        ("s a meta-step", "tasks", "tasks", "s", by_tasks),
    )
    with pictures.panels(path, 4, columns=2, size=(5.5, 4.0)) as axes:
        for panel, (label, along, x, y, rows) in zip(axes, lines, strict=False):
            for method in dict.fromkeys(row["method"] for row in rows):
                points = sorted((row[x], row[y]) for row in rows if row["method"] == method)
                panel.plot(*zip(*points, strict=True), marker="o", label=method)
            panel.set(xscale="log", yscale="log", xlabel=along, ylabel=label)
            if rows:
                panel.legend()
        peers = [row for row in rows_of(results, "peers") if not row["who"].startswith("memmeta")]
        names = [f"{row['case']}\n{row['who']}" for row in peers]
        axes[3].barh(names, [row["over ours"] for row in peers])
        axes[3].axvline(1, color="0.5")
        axes[3].set_xlabel("time over ours" if peers else "peers: not measured")
        axes[0].set_title(f"{kind}, {size}")
