"""Methods × data sets: accuracy or error on held-out tasks after equal seconds of training.

    python -m benchmarks.accuracy.methods [--data ...] [--method ...] [--seeds ...]
        [--quick] [--out DIR]

Each result (method, setting, seed) is a line of accuracy.jsonl in DIR, and is not run again; the
table and accuracy.png are made of these lines alone. What was interrupted goes on where it stopped.

Equal seconds: after compiling, a few meta-steps are timed, and all seeds make as many as fit. On
one core (`taskset -c 0`) or in one thread (XLA_FLAGS=--xla_cpu_multi_thread_eigen=false) they are
the processor's own seconds, whatever else it does.

Accuracy: mean ± 1.96 s / √n over the same 600 tasks for every method, then the range over seeds. At
test, batch norm takes its statistics as in training (from support and query together, with the
preset of the authors from each apart) or from the support alone, and the inner loop makes T steps
as in training or 2 T.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any, get_args

import jax

from benchmarks.accuracy import table
from benchmarks.accuracy.runs import BASELINE, Job, Record, results
from benchmarks.accuracy.settings import CURVES, Preset, Setting, methods_of, recipe_of, sizes_of
from benchmarks.harness.arguments import make_parser
from memmeta.data import DataError
from memmeta.few_shot.algorithms import METHODS


def settings(
    data: list[str], ways: list[int] | None = None, shots: list[int] | None = None
) -> list[Setting]:
    """The kinds of task asked for; by default 5- and 20-way, 1- and 5-shot, or 5 and 10 points.

    Example:
        >>> [str(setting) for setting in settings(["glyphs", "tides"], ways=[20])]
        ['glyphs, 20-way 1-shot', 'glyphs, 20-way 5-shot', 'tides, 5 points', 'tides, 10 points']
    """
    found = []
    for name in data:
        of_shots = shots or ([5, 10] if name in CURVES else [1, 5])
        of_ways = [1] if name in CURVES else ways or [5, 20]
        found += [Setting(name, w, s) for s, w in itertools.product(of_shots, of_ways)]
    return found


def jobs(options: argparse.Namespace) -> list[Job]:
    """One for each setting and method asked for.

    Raises:
        ValueError: a method was asked for by name that makes no sense there.
    """
    found = []
    for setting in settings(options.data, options.ways, options.shots):
        sizes = sizes_of(setting)
        if options.seconds is not None:
            sizes = sizes._replace(seconds=options.seconds)
        sizes = sizes.quick() if options.quick else sizes
        methods: list[Any] = list(options.method or methods_of(setting, options.preset))
        if setting.curves and not options.method:
            methods.append(BASELINE)
        for method in methods:
            if method != BASELINE:
                recipe_of(options.preset, setting, method)
            found.append(Job(setting, sizes, method, options.preset, options.split))
    return found


def run(job: Job, seeds: list[int], data_dir: str | None, path: Path) -> None:
    """Run the seeds of a job that are not finished, and add a line for each."""
    finished = table.read(path)
    known = [table.identity(record) for record in finished]
    seeds = seeds[:1] if job.method == BASELINE else seeds  # it has nothing random
    seeds = [seed for seed in seeds if job.identity(seed) not in known]
    if not seeds:
        return
    counted = {table.of_any_seed(record): record.get("meta_steps") for record in finished}
    meta_steps = counted.get(table.of_any_seed(job.identity(0)))
    for record in results(job, seeds, data_dir, meta_steps):
        table.append(path, record)
        print(line(record), flush=True)
    jax.clear_caches()


def line(record: Record) -> str:
    """One result as it comes."""
    figures = table.figures_of(record)["as trained"].items()
    found = [f"{f['mean']:.4f} ± {f['half_width']:.4f} ({n} steps)" for n, f in figures]
    who = f"{table.setting_of(record)}, {record['method']}, seed {record['seed']}"
    return f"{who}: {', '.join(found)}"


def main(arguments: list[str] | None = None) -> None:
    """Run what is not finished, then show everything that is."""
    parser = make_parser(__doc__, "accuracy", quick="three meta-steps of a small network")
    add = parser.add_argument
    add("--data", nargs="+", default=["glyphs", "tides"], help="names as of memmeta.data.load")
    add("--data-dir", default=None, help="folder of data sets that are not embedded")
    add("--method", nargs="+", choices=METHODS, default=None)
    add("--ways", nargs="+", type=int, default=None)
    add("--shots", nargs="+", type=int, default=None, help="or points of a curve")
    add("--preset", choices=get_args(Preset), default="tuned")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--seconds", type=float, default=None, help="of training; None: those of the setting")
    add("--split", choices=("validation", "test"), default="test")
    add("--table", action="store_true", help="run nothing, show what is finished")
    options = parser.parse_args(arguments)
    path = options.out / "accuracy.jsonl"
    try:
        for job in jobs(options) if not options.table else []:
            run(job, options.seeds, options.data_dir, path)
    except (DataError, ValueError) as error:
        sys.exit(f"accuracy: {error}")
    records = table.read(path)
    if not records:
        sys.exit(f"accuracy: {path} holds no finished result yet")
    print(table.table(records))
    table.picture(records, options.out / "accuracy.png")


if __name__ == "__main__":
    main()
