"""A long run at small size: what the process holds must not grow with the steps it makes.

    python -m benchmarks.cost.soak [--minutes 60] [--checkpoint-every 500] [--out DIR]

Trains for that long, with metrics, validation and checkpoints like any run, and prints the
process's memory, open files, live arrays and compilations along the way. Meta-steps must keep
nothing; a checkpoint may leave a little behind, see `LEFT`, and a large `--checkpoint-every` tells
the two apart. Writes soak.json, and the run itself to the folder run.
"""

import contextlib
import ctypes
import gc
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import show, write
from memmeta.runs import Config, make_trainer, new_run, train

SIZES: dict[str, Any] = {"ways": 2, "queries": 2, "width": 4, "tasks": 2, "log_every": 50}
SMALL = Config(**SIZES, inner_steps=5, cg_steps=5, meta_steps=2**31 - 1, checkpoint_every=500)
STEADY = 0.2
"""After this share of the time a run has met everything it will ever do."""
GROWTH = 4.0
"""Megabytes that the allocator's own holdings may vary by."""
LEFT = 0.1
"""Megabytes a checkpoint may leave: at each save orbax asks tensorstore (0.1.86) for its counters
and for a specification as JSON, and neither's strings are ever freed."""


class TimeIsOver(Exception):
    """Ends the run from inside."""


class Watch:
    """Takes samples of the process after blocks of meta-steps, and ends the run.

    Attributes:
        samples: of all figures.
        seconds: after which the run is asked to stop.
        every: meta-steps between two checkpoints.
    """

    def __init__(self, seconds: float, every: int) -> None:
        self.samples: list[dict[str, float]] = []
        self.began, self.compilations = time.monotonic(), 0
        self.seconds, self.every = seconds, every
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, *_: Any, **__: Any) -> None:
        self.compilations += event.endswith("backend_compile_duration")

    def __call__(self, line: dict[str, Any]) -> None:
        """Take a sample, at most one a second; stop the run when the time is over."""
        passed = time.monotonic() - self.began
        if self.samples and passed < min(self.samples[-1]["seconds"] + 1, self.seconds):
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc: what is free goes back, the rest is held
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.samples.append(
            {
                "seconds": passed,
                "meta_steps": line["step"],
                "checkpoints": line["step"] // self.every,
                "megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
                "open_files": len(os.listdir("/proc/self/fd")),
                "arrays": len(jax.live_arrays()),
                "compilations": self.compilations,
            }
        )
        if passed >= self.seconds:
            raise TimeIsOver


def verdict(samples: list[dict[str, float]]) -> dict[str, Any]:
    """How much more was held at the end of the steady part than at its beginning.

    Under "flat": whether nothing grew but by what `GROWTH` and `LEFT` allow.
    """
    steady = [s for s in samples if s["seconds"] >= STEADY * samples[-1]["seconds"]]
    fifth = max(len(steady) // 5, 1)
    growth = {}
    for name in ("megabytes", "open_files", "arrays", "compilations", "checkpoints"):
        ends = steady[:fifth], steady[-fifth:]
        first, last = (np.median([sample[name] for sample in end]) for end in ends)
        growth[name] = float(last - first)
    flat = growth["megabytes"] <= GROWTH + LEFT * growth["checkpoints"] and all(
        growth[name] <= 0 for name in ("open_files", "arrays", "compilations")
    )
    return growth | {"flat": flat}


def main(arguments: list[str] | None = None) -> bool:
    """Run it; whether everything was flat."""
    parser = make_parser(__doc__, "soak")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--checkpoint-every", type=int, default=SMALL.checkpoint_every)
    options = parser.parse_args(arguments)
    config = replace(SMALL, checkpoint_every=options.checkpoint_every)
    trainer = make_trainer(config)
    block, watch = trainer.compile(), Watch(60 * options.minutes, config.saved_every)
    with new_run(options.out / "run", config) as folder, contextlib.suppress(TimeIsOver):
        train(trainer, block, folder, resume=False, show=watch)
    samples = watch.samples
    shown = np.unique(np.linspace(0, len(samples) - 1, 11).astype(int))
    show("What the process holds", [samples[index] for index in shown])
    found = verdict(samples)
    show(f"Growth over the last {100 * (1 - STEADY):.0f} % of the time", [found])
    write(options.out / "soak.json", {"growth": found, "samples": samples})
    return bool(found["flat"])


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
