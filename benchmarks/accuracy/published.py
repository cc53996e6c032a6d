"""Accuracies that others printed, none of them measured here, and where each was printed.

    python -m benchmarks.accuracy.published

prints all of published.json: source, data set, method, and a figure for each of `WAYS_AND_SHOTS`.
Networks, augmentation and what batch norm does at test differ from row to row: most are four
convolution blocks of 32 or 64 filters, R2-D2's of 96, 192, 384 and 512.
"""

import json
from collections.abc import Collection
from pathlib import Path

from benchmarks.accuracy.settings import Setting

FILE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SOURCES: dict[int, str] = {int(number): text for number, text in FILE["sources"].items()}
ROWS: list[tuple[int, str, str, list[str]]] = [tuple(row) for row in FILE["rows"]]
WAYS_AND_SHOTS = ((5, 1), (5, 5), (20, 1), (20, 5))

PUBLISHED: dict[tuple[Setting, str], tuple[str, int]] = {
    (Setting(data, *ways_and_shots), method): (figure, source)
    for source, data, method, figures in ROWS
    for ways_and_shots, figure in zip(WAYS_AND_SHOTS, figures, strict=False)
    if figure
}
"""By setting and method: accuracy in % as printed, and its number in `SOURCES`."""


def table() -> str:
    """All of them in Markdown, and the sources."""
    of_settings = [f"{ways}-way {shots}-shot" for ways, shots in WAYS_AND_SHOTS]
    rows = [["data", "method", *of_settings, "source"], ["---"] * (len(of_settings) + 3)]
    for source, data, method, figures in ROWS:
        missing = [""] * (len(WAYS_AND_SHOTS) - len(figures))
        rows.append([data, method, *figures, *missing, f"[{source}]"])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *sources(SOURCES)])


def sources(numbers: Collection[int]) -> list[str]:
    """A line for each of some sources."""
    return [f"- [{number}] {text}." for number, text in SOURCES.items() if number in numbers]


if __name__ == "__main__":
    print(table())
