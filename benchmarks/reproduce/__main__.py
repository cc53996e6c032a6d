"""The paper's experiment: four methods on CIFAR-FS, FC100, mini- and tieredImageNet.

    python -m benchmarks.reproduce --data-dir DIR [--out OUT]    # the sets that DIR holds
    python -m benchmarks.reproduce                               # embedded data of the same shapes
    python -m benchmarks.reproduce --quick                       # to see that everything works

5-way 5-shot, 25 query images, 32 tasks a step; the authors' numbers: `problems/as_released.py`.
Accuracy is shown by their test, 20 rounds of 32 tasks with 20 steps of the head at 0.05 from the
stored head on frozen features whatever the method, and by a fair one: each method adapted as it was
trained, 600 episodes; both with 95 % intervals. Cost is shown for the baselines as released, their
features made in every inner step, and with features made once. Each run has a process of its own; a
run that was interrupted goes on from its last checkpoint, a finished one is not made again.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.problems.as_released import METHODS, PRINTED, SETTINGS, STAND_INS, TASKS, Setting
from benchmarks.reproduce._data import read
from benchmarks.reproduce._run import Plan, run
from memmeta.data import DataError

Results = dict[str, dict[str, Any]]


def available(data_dir: Path | None) -> list[Setting]:
    """The data sets that are there; of each of the others one line says what is missing."""
    if data_dir is None:
        return list(STAND_INS)
    found = []
    for setting in SETTINGS:
        try:
            read(setting, "train", data_dir)
            found.append(setting)
        except DataError as error:
            print(f"left out: {' '.join(str(error).split())}")
    return found


def plans(settings: Iterable[Setting], args: argparse.Namespace) -> list[Plan]:
    """Every run: each method with features made once, and as released where that differs."""
    made = []
    for setting in settings:
        small = {"iterations": args.iterations, "width": args.width}
        setting = setting._replace(**{k: v for k, v in small.items() if v is not None})
        for method in args.methods:
            for cached in (True, False) if method in ("anil", "itd_bio") else (True,):
                numbers = (args.tasks, args.task_chunk, args.episodes, args.seed, args.data_dir)
                made.append(Plan(setting, method, cached, *numbers))
    return made


def run_all(plans: list[Plan], out: Path) -> Results:
    """The results by name; each is written as soon as it is there."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    results: Results = {name: found for line in lines for name, found in json.loads(line).items()}
    processes = multiprocessing.get_context("spawn")
    for plan in plans:
        if plan.name in results:
            continue
        # a process of its own: the device's peak memory is counted from a process's start
        with ProcessPoolExecutor(1, mp_context=processes) as pool:
            results[plan.name] = pool.submit(run, plan, out / plan.name).result()
        with path.open("a") as file:
            file.write(json.dumps({plan.name: results[plan.name]}) + "\n")
    return results


def table(plans: list[Plan], results: Results) -> str:
    """The results in Markdown."""
    columns = ("data", "method", "features", "theirs, %", "fair, %", "MB", "s a step", "printed, %")
    rows = [columns, ("---",) * len(columns)]
    for plan in plans:
        found, setting = results[plan.name], plan.setting
        kind = "in every step" if not plan.cached or plan.method == "maml" else "once"
        tests = [
            "{:.1f} ± {:.1f}".format(*found[t]) if t in found else "" for t in ("theirs", "fair")
        ]
        memory = f"{found['megabytes']:.0f}{'' if found['counted'] else ' compiled'}"
        printed = PRINTED.get(setting.data, {}).get(plan.method, "")
        numbers = (*tests, memory, f"{found['seconds']:.2f}", printed)
        rows.append((setting.data, plan.method, kind, *numbers))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder of the data sets; without it embedded ones stand in")
    add("--out", type=Path, default=Path("reproduce"), help="folder of results and checkpoints")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--iterations", type=int, help="meta-steps, instead of the authors'")
    add("--width", type=int, help="filters of each block, instead of the authors'")
    add("--tasks", type=int, default=TASKS, help="in a meta-step and in a round of their test")
    add("--task-chunk", type=int, default=1, help="tasks worked on at once, a divisor of TASKS")
    add("--episodes", type=int, default=600, help="of the fair test")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="two meta-steps of two tasks on narrow networks")
    args = parser.parse_args(given)
    if args.quick:
        quick = {"iterations": 2, "width": 4, "tasks": 2, "episodes": 4, "task_chunk": 1}
        vars(args).update(quick)
    return args


def main() -> None:
    args = arguments()
    made = plans(available(args.data_dir), args)
    print(table(made, run_all(made, args.out)))


if __name__ == "__main__":
    main()
