"""Which settings a method of the hyper-cleaning table is run with: a few are tried for each.

    python -m benchmarks.hyper_cleaning.tune [--quick] [--data-dir DIR] [--only METHOD ...]

Linear model, on a split and labels of their own (seed 100), half of the passes of the table. The
best by the accuracy on the validation examples, of a model trained anew with the learned weights;
the test examples are not looked at. Writes tune.jsonl.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, show
from benchmarks.hyper_cleaning.__main__ import PASSES, QUICK_PASSES, ROWS, SIZES, learned
from benchmarks.hyper_cleaning.data import cleaning, read, stand_in
from benchmarks.hyper_cleaning.methods import CHOICES, METHODS, Drawn
from benchmarks.hyper_cleaning.problem import accuracy, f1, trained

SEED = 100


def main(given: list[str] | None = None) -> list[Row]:
    """Try all settings, print and write what each reaches."""
    parser = make_parser(__doc__, "hyper_cleaning", quick="a small stand-in for the data")
    parser.add_argument("--data-dir", type=Path, help="folder of the files")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args(given)
    name = "stand-in" if options.quick else "fashion"
    train, test = SIZES[name]
    rows = stand_in(2 * train + test, 0) if options.quick else read(name, options.data_dir)
    data = cleaning(rows, train, test, SEED)
    passes = (QUICK_PASSES if options.quick else PASSES["linear"]) / 2
    found: list[Row] = []
    for method in options.only:
        for settings in CHOICES[method]:
            made = METHODS[method]("linear", Drawn(ROWS, train), settings)
            weights, cost = learned(made, data, passes, SEED)
            key = jax.random.key(SEED)
            phi = trained("linear", data.train, jnp.asarray(weights, jnp.float32), key)
            row = {"method": method, **settings._asdict()}
            row |= {"validation": accuracy(phi, data.validation), "F1": f1(weights, data.corrupted)}
            found.append(row | {"s": cost["s"]})
            jax.clear_caches()
    show(f"{name}, linear, {passes:.0f} passes, seed {SEED}", found)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tune.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return found


if __name__ == "__main__":
    main()
