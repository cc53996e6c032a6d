"""What only an accelerator can answer, in one command of less than ten minutes, without a network.

    make bench-accelerator                or: python -m benchmarks.accelerator [--quick] [--out DIR]

On whichever device JAX sees: peak memory by the device's own statistics, seconds of meta-steps and
their share of the matrix units, float32, TF32 and bfloat16, PyTorch on the same device, every
estimator of the list against an exact hypergradient, `task_chunk="auto"` against other chunks,
scaling in tasks and inner steps, the forms of a convolution, messages between devices.

What is missing of the packages is printed first; parts that need it are left out. Each part runs in
a process of its own, one after the other, within a limit of its own; one that fails becomes a line
that says so. Writes accelerator.json after each part, and accelerator.md and accelerator.png from
it. With `--quick` all of it runs in small on a CPU too, to see that it works.
"""

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, show

MINUTES = 9.5
"""Of the whole command: a part gets its limit or what is left, whichever is less.

A quick run, for which a CPU compiles, has three times as much of both.
"""
NEEDED = ("jax", "chex", "flax", "jaxtyping", "numpy", "optax")
WANTED = {
    "matplotlib": "the picture",
    "torch": "peers: all",
    "torchopt": "peers: torchopt",
    "higher": "peers: higher",
    "torch_maml": "peers: torch_maml",
}
OWN = ("-m", "benchmarks.accelerator", "--part")
PEERS = ("-m", "benchmarks.peers.compare", "--worker", "--repeats", "5")
PEER_CASES = ("--tasks", "32", "--only", "a:maml:5", "b32:memory_reduced:20")
QUICK_PEER_CASES = ("--tasks", "2", "--only", "a:maml:1")
FULL_PRECISION = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
SIMULATED = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}


class Part(NamedTuple):
    """One question.

    Attributes:
        seconds: after which its process is stopped; what it printed by then is kept.
        title: of its table.
        needs: packages without which it is left out.
        command: arguments of Python.
        environment: variables beside those that all parts have.
    """

    seconds: float
    title: str
    needs: tuple[str, ...] = NEEDED
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # noqa: RUF012


PARTS = {
    "products": Part(40, "Matrix products", needs=("jax", "numpy")),
    "memory": Part(120, "Peak memory, by the device's statistics"),
    "speed": Part(90, "Seconds of a meta-step"),
    "precision": Part(70, "b84 in three precisions"),
    "peers": Part(70, "PyTorch beside it, float32", (*NEEDED, "torch"), PEERS, FULL_PRECISION),
    "peers, TF32": Part(60, "PyTorch beside it, TF32 in both", (*NEEDED, "torch"), PEERS),
    "conformance": Part(150, "Every estimator, float32"),
    "chunks": Part(80, 'Tasks at once: "auto" and others'),
    "scaling": Part(100, "Scaling in tasks and in inner steps"),
    "convolutions": Part(60, "Convolutions of b84 alone, bfloat16"),
    "messages": Part(30, "Messages in a meta-step"),
    "messages, simulated": Part(
        60, "Messages, simulated devices of a CPU", NEEDED, (*OWN, "messages"), SIMULATED
    ),
}


def rows_of(part: str, quick: bool, arguments: list[str]) -> Iterator[Row]:
    """In the process of a part: its rows, one by one."""
    folder = "benchmarks.accelerator."
    if part == "machine":
        from benchmarks.harness.tables import machine

        yield machine()
    elif part in ("memory", "peak"):
        peak: Any = importlib.import_module(folder + "peak")
        yield from peak.rows(quick) if part == "memory" else peak.one(arguments[0], quick)
    elif part in ("speed", "precision", "chunks", "scaling"):
        yield from importlib.import_module(folder + "meta_steps").rows(part, quick)
    else:
        yield from importlib.import_module(folder + part).rows(quick)


def command_of(name: str, part: Part, quick: bool) -> list[str]:
    """The command line of a part's process."""
    if part.command == PEERS:
        return [*part.command, *(QUICK_PEER_CASES if quick else PEER_CASES)]
    return [*(part.command or (*OWN, name)), *(["--quick"] if quick else [])]


def environment(more: dict[str, str], cache: Path) -> dict[str, str]:
    """Of a part's process: memory is taken as it is needed, and the CPU is there too."""
    found = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **more,
    }
    platforms = found.get("JAX_PLATFORMS")
    if platforms and "cpu" not in platforms:
        found["JAX_PLATFORMS"] = f"{platforms},cpu"
    return found


def run(command: list[str], seconds: float, variables: dict[str, str], log: Path) -> dict[str, Any]:
    """Run Python; the rows that it printed as JSON, its seconds, and what went wrong."""
    began, said = time.perf_counter(), ""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=variables,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            printed, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            said = f"stopped after {seconds:.0f} s"
    if process.returncode and not said:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        said = f"ended with {process.returncode}: {''.join(last)[:120]}"
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return {"rows": rows, "said": said, "seconds": round(time.perf_counter() - began, 1)}


def missing() -> dict[str, str]:
    """Packages that are not installed, and what cannot be done without."""
    needed = dict.fromkeys(NEEDED, "nearly everything")
    return {
        name: what
        for name, what in (needed | WANTED).items()
        if importlib.util.find_spec(name) is None
    }


def say_missing(packages: dict[str, str]) -> None:
    """The list, and how they come to a machine without a network."""
    for name, what in packages.items():
        print(f"missing: {name} ({what})")
    if packages:
        print("elsewhere:  pip download --no-deps --dest wheels NAME ...")
        print(
            "here:       pip install --no-deps --no-index --find-links wheels NAME ...", flush=True
        )


def measured(chosen: list[str], quick: bool, out: Path) -> dict[str, Any]:
    """Every part in turn; accelerator.json is written after each."""
    absent, began = missing(), time.perf_counter()
    say_missing(absent)
    results: dict[str, Any] = {"quick": quick, "missing": list(absent), "parts": {}}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        variables = environment({}, Path(cache))
        found = run([*OWN, "machine"], 60, variables, out / "machine.log")
        results["machine"] = found["rows"][0] if found["rows"] else {"said": found["said"]}
        print(*(f"{name}: {value}" for name, value in results["machine"].items()), sep="\n")
        for name in chosen:
            part, more = PARTS[name], 3 if quick else 1
            left = more * 60 * MINUTES - (time.perf_counter() - began)
            lacking = [package for package in part.needs if package in absent]
            if lacking or left < 5:
                said = f"left out: {' and '.join(lacking) or 'no time left'}"
                each: dict[str, Any] = {"rows": [], "said": said, "seconds": 0.0}
            else:
                variables = environment(part.environment, Path(cache))
                log = out / f"{name.replace(', ', '_')}.log"
                limit = min(more * part.seconds, left)
                each = run(command_of(name, part, quick), limit, variables, log)
            results["parts"][name] = each
            show(f"{part.title} ({each['seconds']} s)", each["rows"])
            if each["said"]:
                print(f"{part.title}: {each['said']}", flush=True)
            written = json.dumps(results, indent=1) + "\n"
            (out / "accelerator.json").write_text(written, encoding="utf-8")
    return results


def main(arguments: list[str] | None = None) -> None:
    """Measure all parts; print, write the table, draw."""
    parser = make_parser(__doc__, "accelerator", quick="small sizes, to see that all of it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        for row in rows_of(options.part[0], options.quick, options.part[1:]):
            print(json.dumps(row), flush=True)
        return
    results = measured(options.only, options.quick, options.out)
    from benchmarks.accelerator import report

    lines = report.aims(results)
    show("Aims", lines)
    titles = {name: part.title for name, part in PARTS.items()}
    table = options.out / "accelerator.md"
    table.write_text(report.table(results, titles), encoding="utf-8")
    print(f"figures in {options.out / 'accelerator.json'}\ntable in {table}")
    if "matplotlib" not in results["missing"]:
        report.picture(results, options.out / "accelerator.png")


if __name__ == "__main__":
    main()
