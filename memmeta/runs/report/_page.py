"""The report's page: one HTML file without references to other files, and a PNG of each chart."""

import base64
import dataclasses
import io
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
from jaxtyping import Array, Shaped

from memmeta.data._files import own_folder, write_whole
from memmeta.runs.report._charts import RUNS, Chart, charts
from memmeta.runs.report._episode import picture
from memmeta.runs.report._judge import Episode, Judged
from memmeta.runs.report._remarks import remarks

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUERIES_SHOWN = 5


def write(runs: Sequence[Judged], page: Path, episodes: int) -> list[Path]:
    """Write the page and the PNGs.

    Args:
        runs: the runs to show side by side, from `judge_all`.
        page: the path of the HTML file; the PNGs go into a folder with the same name but no suffix.
        episodes: on how many test episodes of each group the runs were evaluated.

    Returns:
        The paths of all files written.

    Raises:
        OSError: a file cannot be written.
    """
    sections = charts(runs, episodes)
    pictures = page.with_suffix("")
    page.parent.mkdir(parents=True, exist_ok=True)
    own_folder(pictures)
    written = [page]
    for chart in (chart for found in sections.values() for chart in found):
        path = pictures / f"{chart.name}.png"
        write_whole(path, chart.png)
        written.append(path)
    for number, run in enumerate(runs, 1):
        if run.episode is not None:
            path = pictures / (f"episode-{number}.png" if len(runs) > 1 else "episode.png")
            write_whole(path, picture(run.episode, run.config.ways))
            written.append(path)
    write_whole(page, html(runs, sections))
    return written


def html(runs: Sequence[Judged], sections: dict[str, list[Chart]]) -> str:
    """The whole page as HTML."""
    names = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    body = [
        f"<h1>{escape(names)}</h1>",
        f'<p class="soft">{escape(subtitle(runs))}</p>',
        figures_table(runs),
        section("Learning", runs, cards(sections["Learning"])),
        section("An episode", [], episodes_html(runs)),
        section(
            "Health of the solver",
            runs,
            remarks_html(runs),
            cards(sections["Health of the solver"]),
        ),
        section("Time and memory", runs, cards(sections["Time and memory"])),
        section("Options", [], options_table(runs)),
    ]
    style = files("memmeta.runs.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>memmeta: {escape(names)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def section(title: str, legend: Sequence[Judged], *parts: str) -> str:
    """A heading, a legend if there are several runs, and the parts; empty if all parts are."""
    content = "\n".join(filter(None, parts))
    if not content:
        return ""
    shown = ""
    if len(legend) > 1:
        shown = '<p class="legend">' + "".join(map(label, range(len(legend)), legend)) + "</p>"
    return f"<section><h2>{title}</h2>\n{shown}\n{content}</section>"


def label(number: int, run: Judged) -> str:
    """The name of a run, in its colour."""
    colour = f"--colour: var(--run-{number % len(RUNS)})"
    return f'<span class="run" style="{colour}">{escape(run.name)}</span>'


def subtitle(runs: Sequence[Judged]) -> str:
    """The data set, ways and shots of the runs."""
    kinds = {(run.config.data, run.config.ways, run.config.shots) for run in runs}
    return "; ".join(f"{data}, {ways}-way {shots}-shot" for data, ways, shots in sorted(kinds))


def figures_table(runs: Sequence[Judged]) -> str:
    """A table of final results, with a column for each run."""
    rows: dict[str, list[str]] = {"method": [run.config.method for run in runs]}
    rows["meta-steps"] = [meta_steps(run) for run in runs]
    finals: list[Any] = [run.final or {} for run in runs]
    for kind in dict.fromkeys(name for final in finals for name in final.get("accuracy", {})):
        found = [final.get("accuracy", {}).get(kind) for final in finals]
        rows[f"test accuracy, {kind}"] = [percent(interval) for interval in found]
    rows["best validation accuracy"] = [best_validation(run) for run in runs]
    rows["meta-steps a second (median)"] = [
        number(final.get("meta_steps_per_second"), "{:.2f}") for final in finals
    ]
    rows["memory of the compiled meta-step"] = [
        number(final.get("meta_step_temporary_bytes"), "{:.1f} MB", 1e-6) for final in finals
    ]
    rows["on"] = [final.get("backend", "–") for final in finals]
    return table(runs, rows)


def options_table(runs: Sequence[Judged]) -> str:
    """Tables of the options: first those that differ between runs, then, folded, the others."""
    options = [dataclasses.asdict(run.config) for run in runs]
    rows = {name: [str(found[name]) for found in options] for name in options[0]}
    differ = {name: values for name, values in rows.items() if len(set(values)) > 1}
    same = {name: values for name, values in rows.items() if name not in differ}
    folded = f"<details><summary>{len(same)} options{' in common' if differ else ''}</summary>"
    folded += table(runs, same) + "</details>"
    return (table(runs, differ) if differ else "") + folded


def table(runs: Sequence[Judged], rows: dict[str, list[str]]) -> str:
    """A table with a column for each run, without rows that have no values."""
    heads = "".join(f"<th>{label(*run)}</th>" for run in enumerate(runs))
    lines = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(v)}</td>" for v in values) + "</tr>"
        for name, values in rows.items()
        if any(value != "–" for value in values)
    )
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def meta_steps(run: Judged) -> str:
    """The number of meta-steps done, and of how many if the run has not ended."""
    done = run.lines[-1]["step"] if run.lines else 0
    return str(done) if done == run.config.meta_steps else f"{done} of {run.config.meta_steps}"


def best_validation(run: Judged) -> str:
    """The best validation accuracy and its meta-step; a dash if there is none."""
    found = [line for line in run.lines if line.get("validation_accuracy") is not None]
    if not found:
        return "–"
    best = max(found, key=lambda line: line["validation_accuracy"])
    interval = {"mean": best["validation_accuracy"], "interval": best["validation_interval"]}
    return f"{percent(interval)} at {best['step']}"


def percent(found: dict[str, float] | None) -> str:
    """A mean and its interval in percent; a dash if there is none."""
    return "–" if found is None else f"{100 * found['mean']:.1f} ± {100 * found['interval']:.1f} %"


def number(value: Any, form: str, scale: float = 1.0) -> str:
    """A scaled and formatted number; a dash for None."""
    return "–" if value is None else form.format(scale * value)


def cards(found: Sequence[Chart]) -> str:
    """The charts as a grid of cards."""
    inside = "".join(
        f'<figure class="card"><h3>{escape(chart.title)}</h3>'
        f'<p class="soft">{escape(chart.note)}</p>{chart.svg}</figure>'
        for chart in found
    )
    return f'<div class="cards">{inside}</div>' if inside else ""


def remarks_html(runs: Sequence[Judged]) -> str:
    """A list of the remarks on each run."""
    items = [
        f"<li>{label(index, run)}: {escape(remark)}</li>"
        for index, run in enumerate(runs)
        for remark in remarks(run)
    ]
    return f'<ul class="remarks">{"".join(items)}</ul>'


def episodes_html(runs: Sequence[Judged]) -> str:
    """The episode of each run; runs with the same data, ways and shots show the same task."""
    inside = "".join(
        episode_html(index, run) for index, run in enumerate(runs) if run.episode is not None
    )
    if not inside:
        return ""
    how = (
        "Left, framed: the support examples. Then query examples: what the learner says before and "
        "after adaptation, with its probability. Dashed: wrong after adaptation."
    )
    return f'<p class="soft">{how}</p><div class="episodes">{inside}</div>'


def episode_html(index: int, run: Judged) -> str:
    """The episode of one run, with the accuracy before and after adaptation."""
    episode = run.episode
    assert episode is not None
    targets = episode.task.query_targets
    scores = [np.mean(p.argmax(axis=1) == targets) for p in (episode.before, episode.after)]
    heading = (
        f"{escape(episode.group)}: {100 * scores[0]:.0f}&nbsp;% → {100 * scores[1]:.0f}&nbsp;%"
    )
    rows = "".join(class_html(episode, way) for way in range(run.config.ways))
    return f'<div class="card"><h3>{label(index, run)}, {heading}</h3>{rows}</div>'


def class_html(episode: Episode, way: int) -> str:
    """One class of an episode: some of its support examples, then some of its query examples."""
    task, name = episode.task, class_name(way)
    support = [
        tile(task.support_inputs[i], "support", name)
        for i in np.flatnonzero(task.support_targets == way)[:QUERIES_SHOWN]
    ]
    query = []
    for i in np.flatnonzero(task.query_targets == way)[:QUERIES_SHOWN]:
        before, after = episode.before[i], episode.after[i]
        right = after.argmax() == way
        caption = f"{said_of(before)} →<br><b>{said_of(after)} {'✓' if right else '✗'}</b>"
        query.append(tile(task.query_inputs[i], "right" if right else "wrong", caption))
    tiles = "".join(f'<div class="tiles">{"".join(found)}</div>' for found in (support, query))
    return f'<div class="class">{tiles}</div>'


def said_of(probabilities: np.ndarray) -> str:
    """The most probable class and its probability; "any" if all are equally probable."""
    if np.ptp(probabilities) < 1e-3:
        return "any"
    return f"{class_name(int(probabilities.argmax()))} {100 * probabilities.max():.0f} %"


def class_name(way: int) -> str:
    """A, B, C, …, because a label means a different class in every episode."""
    return LETTERS[way] if way < len(LETTERS) else str(way)


def tile(
    image: Shaped[Array | np.ndarray, "height width channels"], kind: str, caption: str
) -> str:
    """One example with a caption below."""
    return (
        f'<figure class="tile {kind}"><img alt="" src="{data_uri(image)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def data_uri(image: Shaped[Array | np.ndarray, "height width channels"]) -> str:
    """An image as a data URI, so that the page needs no other file; floats are from 0 to 1."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = np.clip(255 * pixels, 0, 255).astype(np.uint8)
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    png = io.BytesIO()
    matplotlib.image.imsave(png, pixels, format="png")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
