"""Seconds from `memmeta train` to its first meta-step, with an empty and with a warm cache.

    python -m benchmarks.cost.start [--repeats N] [--out DIR] [-- OPTIONS OF memmeta train]

Starts `memmeta train` in a process of its own, again and again, each time on the same folder for
compiled programs (empty at first), and waits for the first line of metrics, which each run writes
after one meta-step. Writes start.json.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, aim, show, write

LIMIT = 10.0
"""Seconds, cache warm."""


def first_step(folder: Path, cache: Path, options: list[str]) -> float:
    """Seconds until a new run's first meta-step is done; the run is ended then."""
    command = [sys.executable, "-m", "memmeta", "train", "--run", str(folder)]
    command += ["--log-every", "1", "--meta-steps", "1000", "--checkpoint-every", "1000", *options]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    began = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"memmeta train ended with {process.returncode}")
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        process.terminate()
    return seconds


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__, "start")
    parser.add_argument("--repeats", type=int, default=3, help="with a warm cache")
    parser.add_argument("options", nargs="*", help="of memmeta train")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found = [
            first_step(place / f"run{number}", place / "cache", options.options)
            for number in range(1 + options.repeats)
        ]
    rows: list[Row] = [
        {"cache": "empty" if number == 0 else "warm", "seconds": seconds}
        for number, seconds in enumerate(found)
    ]
    show("From `memmeta train` to the first meta-step", rows)
    warm = sorted(found[1:])[(len(found) - 1) // 2]
    line = aim("memmeta train to the first meta-step, cache warm, s", "≤ 10", warm, warm <= LIMIT)
    show("Aims", [line])
    write(options.out / "start.json", {"rows": rows, "aims": [line]})


if __name__ == "__main__":
    main()
