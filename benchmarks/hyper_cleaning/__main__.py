"""Data hyper-cleaning: half of 5,000 labels are wrong, 5,000 clean examples tell which.

    python -m benchmarks.hyper_cleaning [--quick] [--data fashion digits] [--data-dir DIR]
        [--model linear network] [--only METHOD ...] [--passes N] [--seeds N ...] [--out DIR]

Each method makes as many meta-steps as `--passes` passes over the training examples pay for, in
gradients and products. Then a model is trained anew with the learned weights, in the same way for
all, and tested: mean over seeds, and a 95 % interval from the number of test examples. Beside
them: no weights, the clean half alone (which no method is told), the validation examples alone, and
both. F1 is that of finding the wrong labels by weights below ½. MB: temporary buffers of the
compiled run.
Results are kept in hyper_cleaning.jsonl of DIR, and what is there is not run again.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import compiled, temporary_megabytes
from benchmarks.harness.tables import Row, machine, show
from benchmarks.hyper_cleaning.data import Cleaning, Rows, cleaning, read, stand_in
from benchmarks.hyper_cleaning.methods import CHOICES, METHODS, Drawn, Method
from benchmarks.hyper_cleaning.problem import Model, accuracy, f1, trained
from memmeta.data import DataError

SIZES = {"fashion": (5000, 10_000), "digits": (4000, 2000), "stand-in": (200, 200)}
"""Examples to train on (and to validate on), and to test on."""
REFERENCES = ("no weights", "clean half", "validation alone", "clean half, validation")
ROWS, QUICK_PASSES = 100, 130.0
PASSES: dict[Model, float] = {"linear": 1000.0, "network": 150.0}
"""Rows of a minibatch; passes over the training examples that a run may cost."""


def learned(method: Method, data: Cleaning, passes: float, seed: int) -> tuple[np.ndarray, Row]:
    """The weights after meta-training, and what they cost."""
    steps = max(1, round(passes / (method.gradients + method.products)))
    task = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (data.train, data.validation))
    begin = method.step.init(jnp.zeros(len(data.corrupted)), task, jax.random.key(seed))

    def run(state: Any, task: Any) -> tuple[Any, jax.Array]:
        def one(state: Any, _: None) -> tuple[Any, jax.Array]:
            state, metrics = method.step.update(state, task)
            return state, metrics.loss

        return jax.lax.scan(one, state, length=steps)

    program = compiled(run, begin, task, quick=False)
    began = time.perf_counter()
    state, losses = jax.block_until_ready(program(begin, task))
    cost: Row = {
        "steps": steps,
        "gradients": round(steps * method.gradients),
        "products": round(steps * method.products),
        "s": time.perf_counter() - began,
        "MB": temporary_megabytes(program),
        "loss": float(jnp.mean(losses[-max(1, steps // 10) :])),
    }
    return np.asarray(jax.nn.sigmoid(state.meta.meta_params)), cost


def reference(name: str, data: Cleaning) -> tuple[Rows, np.ndarray]:
    """What a row without learned weights is trained on, and the weights."""
    whole = Rows(*(np.concatenate(pair) for pair in zip(data.train, data.validation, strict=True)))
    ones, clean = np.ones(len(data.corrupted)), (~data.corrupted).astype(float)
    return {
        "no weights": (data.train, ones),
        "clean half": (data.train, clean),
        "validation alone": (data.validation, ones),
        "clean half, validation": (whole, np.concatenate([clean, ones])),
    }[name]


def result(job: Row, data: Cleaning, passes: float) -> Row:
    """All figures of one method, model and seed."""
    name, model = job["method"], job["model"]
    if name in REFERENCES:
        rows, weights = reference(name, data)
        found: Row = {}
    else:
        rows = data.train
        batch = Drawn(ROWS, len(data.corrupted))
        method = METHODS[name](model, batch, CHOICES[name][0])
        weights, found = learned(method, data, passes, job["seed"])
        found["F1"] = f1(weights, data.corrupted)
    key = jax.random.key(job["seed"])
    phi = trained(model, rows, jnp.asarray(weights, jnp.float32), key)
    return {**job, "accuracy": accuracy(phi, data.test), **found}


def results(jobs: list[Row], folder: Path | None, passes: float, path: Path) -> Iterator[Row]:
    """Those of all jobs; each is written as soon as it is there."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [json.loads(line) for line in lines]
    for job in jobs:
        known = [each for each in kept if job.items() <= each.items()]
        if known:
            yield known[-1]
            continue
        train, test = SIZES[job["data"]]
        rows = (
            stand_in(2 * train + test, 0)
            if job["data"] == "stand-in"
            else read(job["data"], folder)
        )
        found = result(job, cleaning(rows, train, test, job["seed"]), passes)
        with path.open("a") as file:
            file.write(json.dumps({**found, "machine": machine()}) + "\n")
        jax.clear_caches()
        yield found


def table(found: list[Row], test: int) -> list[Row]:
    """A row a method: means over its seeds."""
    rows = []
    for name, each in itertools.groupby(found, lambda row: row["method"]):
        seeds = list(each)
        mean = {
            k: float(np.mean([s[k] for s in seeds])) for k in seeds[0] if is_figure(seeds[0][k])
        }
        share = mean["accuracy"]
        half = 1.96 * (share * (1 - share) / test) ** 0.5
        row: Row = {"method": name, "test %": f"{100 * share:.1f} ± {100 * half:.1f}"}
        row["F1 %"] = f"{100 * mean['F1']:.1f}" if "F1" in mean else ""
        for title in ("steps", "gradients", "products"):
            row[title] = f"{mean[title]:.0f}" if title in mean else ""
        rows.append(row | {k: f"{mean[k]:.3g}" if k in mean else "" for k in ("s", "MB", "loss")})
    return rows


def is_figure(value: Any) -> bool:
    return isinstance(value, int | float)


def claims(found: list[Row], test: int) -> list[Row]:
    """Whether learned weights beat none, and reach the clean half within its interval."""
    mean = {
        name: float(np.mean([row["accuracy"] for row in each]))
        for name, each in itertools.groupby(found, lambda row: row["method"])
    }
    if not {"no weights", "clean half"} <= mean.keys():
        return []
    none, clean = mean["no weights"], mean["clean half"]
    least = clean - 1.96 * (clean * (1 - clean) / test) ** 0.5
    return [
        {
            "method": name,
            f"> {100 * none:.1f} (no weights)": "holds" if share > none else "MISSED",
            f"≥ {100 * least:.1f} (clean half, its interval)": "holds"
            if share >= least
            else "MISSED",
        }
        for name, share in mean.items()
        if name not in REFERENCES
    ]


def arguments(given: list[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = make_parser(__doc__, "hyper_cleaning", quick="a small stand-in for the data")
    add = parser.add_argument
    add("--data", nargs="+", choices=("fashion", "digits"), default=["fashion"])
    add("--data-dir", type=Path, help="folder of the files, where they are not where they install")
    add("--model", nargs="+", choices=get_args(Model), default=list(get_args(Model)))
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    add("--passes", type=float, help="over the training examples that a run may cost")
    add("--seeds", nargs="+", type=int, default=[0])
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> list[Row]:
    """Run what is not there yet; print the tables. Returns all results."""
    options = arguments(given)
    options.out.mkdir(parents=True, exist_ok=True)
    path, everything = options.out / "hyper_cleaning.jsonl", []
    names = (*REFERENCES, *options.only)
    for data, model in itertools.product(
        ["stand-in"] if options.quick else options.data, options.model
    ):
        passes = options.passes or (QUICK_PASSES if options.quick else PASSES[model])
        title = f"{data}, {model}, {passes:.0f} passes"
        jobs = [
            {"data": data, "model": model, "method": name, "seed": seed}
            | ({} if name in REFERENCES else {"passes": passes})
            for name, seed in itertools.product(names, options.seeds)
        ]
        try:
            found = []
            for row in results(jobs, options.data_dir, passes, path):
                print(
                    f"{title}: {row['method']}, seed {row['seed']}: {row['accuracy']:.4f}",
                    flush=True,
                )
                found.append(row)
        except DataError as error:
            sys.exit(f"hyper_cleaning: {error}")
        show(title, table(found, SIZES[data][1]))
        show(f"{title}: aims", claims(found, SIZES[data][1]))
        everything += found
    return everything


if __name__ == "__main__":
    main()
