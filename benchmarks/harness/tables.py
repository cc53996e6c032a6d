"""Tables on the terminal, JSON files, and where the figures were measured."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table, one line a row; columns are those of the first row."""
    if not rows:
        return
    names = list(rows[0])
    cells = [[_cell(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    print(f"\n{title}")
    for line in [names, *cells]:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
    print(flush=True)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def aim(what: str, wanted: str, found: float, holds: bool) -> Row:
    """One line of a table of aims."""
    return {"what": what, "aim": wanted, "found": found, "": "holds" if holds else "MISSED"}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, and the machine they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    print(f"figures in {path}")


def machine() -> dict[str, Any]:
    """What figures of cost depend on."""
    import jax  # only here: whoever asks for the devices takes memory of them

    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": cores(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def cores() -> int | None:
    """How many cores this process may use; None where the platform does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
