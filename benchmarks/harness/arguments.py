"""Command-line arguments that mean the same in every benchmark."""

import argparse
from pathlib import Path


def make_parser(
    description: str | None, out: str, quick: str | None = None, repeats: int | None = None
) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring and knows the common options.

    Args:
        description: the docstring, shown as it is written.
        out: name of the results' default folder, under `build`.
        quick: what `--quick` leaves out; None: there is no such option.
        repeats: default of `--repeats`, for commands that measure seconds, which have `--cpu-time`
            too; None: they have neither.

    Returns:
        The parser, to which a benchmark adds its own options.
    """
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, default=Path("build") / out, help="folder of results")
    if quick is not None:
        found.add_argument("--quick", action="store_true", help=quick)
    if repeats is not None:
        found.add_argument("--repeats", type=int, default=repeats, help="timed calls of each")
        text = "seconds of this process alone: on one core, less what other processes took"
        found.add_argument("--cpu-time", action="store_true", help=text)
    return found
