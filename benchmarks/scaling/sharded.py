"""Parameters larger than a device: bytes, messages and numbers of a meta-step on a sharded decoder.

    python -m benchmarks.scaling.sharded [--quick] [--layers N] [--width N] [...] [--out DIR]

First, on eight simulated devices of a CPU: a small decoder whose θ, Adam's moments, φ, inner state,
solver's vectors and data are sharded over the axis "model" of a mesh, once with φ = θ and once with
low-rank factors as φ. Bytes a device are those of the compiled program; its messages are counted
and explained; the meta-gradient is compared with that of one device.

Then on paper: bytes a device by part for a decoder of --layers, --width, … (default: the shapes of
a LLaMA of 7 billion parameters) with factors of --rank as φ, on --tasks-axis × --model-axis devices
of --memory GB, from shapes alone (`benchmarks.scaling.paper`). Beside it stand the bytes of the
program that XLA compiles for as many simulated devices, of this size and of small ones; arrays of
the large one are never made. --policy is a name in jax.checkpoint_policies; with another than
nothing_saveable the compiled bytes stand alone. Last, what some policies keep. Writes sharded.json.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import collectives, compiled, flops, temporary_megabytes
from benchmarks.harness.tables import Row, aim, show, write
from benchmarks.scaling import decoder, paper
from benchmarks.scaling.decoder import MODEL, Shape

SMALL = {"φ = θ": Shape(layers=24), "φ low-rank": Shape(layers=24, rank=4)}
POLICIES = ("everything_saveable", "dots_saveable", "nothing_saveable")
KEEPING = Shape(layers=8, rank=4, length=128)
MESHES, QUICK_MESHES = ((1, 8), (2, 4)), ((1, 8),)
LARGE = Shape(32, 4096, 32, 11008, 32000, 16, 8, 2048)
CHECKS = (
    Shape(8, 256, 4, 704, 1024, 16, 8, 128),
    Shape(16, 256, 4, 704, 1024, 16, 8, 128),
    Shape(8, 256, 4, 704, 1024, 16, 8, 256),
)
EACH, MOMENTUM = 2, 0.9
"""Tasks on a device, or in all where numbers are compared; Adam's β₁: after one step the first
moment is 1 − β₁ of the meta-gradient."""
WHY = {
    "all-gather": "a matrix, whole while its layer is computed; small arrays that are looked at "
    "together",
    "all-reduce": "gradients summed over the devices' sequences; inner products and figures; with "
    "several devices of tasks the sum of all",
    "all-to-all": "activations cut along their width, where a matrix is cut by its rows",
    "collective-permute": "the same between neighbours",
    "reduce-scatter": "a sum of which each device keeps its part",
}


def mesh_of(tasks: int, model: int) -> Mesh:
    """The first devices as a mesh of two axes."""
    return Mesh(np.array(jax.devices()[: tasks * model]).reshape(tasks, model), ("tasks", MODEL))


def shapes(shape: Shape, mesh: Mesh, each: int) -> tuple[Any, Any]:
    """State and tasks of a meta-step as shapes with shardings: nothing is allocated."""
    step, count = decoder.meta_step(shape, mesh), each * mesh.shape["tasks"]
    theta = jax.eval_shape(lambda key: decoder.parameters(shape, key), jax.random.key(0))
    batch = jax.eval_shape(lambda key: decoder.tasks(shape, count, key), jax.random.key(0))
    theta, batch = decoder.sharded(mesh, theta, batch)

    def like_theta(tree: Any) -> Any:
        return decoder.sharded(mesh, tree, ())[0]

    def whole(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P())
            ),
            tree,
        )

    state = jax.eval_shape(step.init, theta)
    adam, *rest = state.optimizer
    adam = whole(adam)._replace(mu=like_theta(adam.mu), nu=like_theta(adam.nu))
    state = whole(state)._replace(meta_params=theta, optimizer=(adam, *whole(rest)))
    return state, batch


def program_of(shape: Shape, mesh: Mesh, each: int) -> jax.stages.Compiled:
    """The compiled meta-step, from shapes."""
    return compiled(decoder.meta_step(shape, mesh).compiled, *shapes(shape, mesh, each))


class Run:
    """One meta-step of `EACH` tasks in all on a mesh: bytes a device by part, and the gradient."""

    def __init__(self, shape: Shape, tasks: int, model: int) -> None:
        mesh, each = mesh_of(tasks, model), EACH // tasks
        self.program = program_of(shape, mesh, each)
        memory: Any = self.program.memory_analysis()
        given, rest = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        found = paper.arguments(shape, model, each)
        self.row: Row = {f"{name}, kB": size / 1e3 for name, size in found.items()}
        self.row |= {"all else, kB": rest / 1e3, "in all, kB": (given + rest) / 1e3}
        theta = decoder.parameters(shape, jax.random.key(0))
        batch = decoder.tasks(shape, EACH, jax.random.key(1))
        theta, batch = decoder.sharded(mesh, theta, batch)
        state, _ = self.program(decoder.meta_step(shape, mesh).init(theta), batch)
        moments = [np.ravel(np.asarray(m)) for m in jax.tree.leaves(state.optimizer[0].mu)]
        self.gradient = np.concatenate(moments) / (1 - MOMENTUM)


def measured(meshes: tuple[tuple[int, int], ...]) -> dict[str, list[Row]]:
    """Bytes, messages and the meta-gradient of the small decoders."""
    tables: dict[str, list[Row]] = {"bytes": [], "messages": [], "gradient": []}
    for name, shape in SMALL.items():
        alone = Run(shape, 1, 1)
        tables["bytes"].append({"": name, "tasks × model": "1 × 1", **alone.row})
        for tasks, model in meshes:
            where = {"": name, "tasks × model": f"{tasks} × {model}"}
            found = Run(shape, tasks, model)
            tables["bytes"].append(where | found.row)
            shares = {key: found.row[key] * model / alone.row[key] for key in found.row}
            tables["bytes"].append(where | {"tasks × model": f"· {model} / alone"} | shares)
            tables["messages"] += [where | line for line in messages(found.program)]
            apart = np.linalg.norm(found.gradient - alone.gradient)
            share = float(apart / np.linalg.norm(alone.gradient))
            tables["gradient"].append(where | {"apart": share})
    return tables


def messages(program: jax.stages.Compiled) -> list[Row]:
    """Messages by kind: how many stand in a compiled program, and the largest one's bytes."""
    found = collectives(program)
    rows = []
    for kind in sorted({kind for kind, _ in found}):
        sizes = [size for each, size in found if each == kind]
        rows.append({"kind": kind, "count": len(sizes), "largest, kB": max(sizes) / 1e3})
        rows[-1]["why"] = WHY.get(kind, "")
    return rows


def predicted(shape: Shape, tasks: int, model: int) -> tuple[list[Row], float]:
    """The table on paper, GB by part, and their sum."""
    found = {**paper.arguments(shape, model, EACH), **paper.temporary(shape, model)}
    rows: list[Row] = [{"part": name, "GB": size / 1e9} for name, size in found.items()]
    total = sum(found.values())
    rows.append({"part": f"in all, {tasks} × {model} devices", "GB": total / 1e9})
    return rows, total


def checked(shape: Shape, tasks: int, model: int) -> Row:
    """Bytes a device of the compiled program beside those on paper."""
    memory: Any = program_of(shape, mesh_of(tasks, model), EACH).memory_analysis()
    given, rest = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    row: Row = {"parameters, M": parameters(shape) / 1e6, "tasks × model": f"{tasks} × {model}"}
    row |= {"layers": shape.layers, "width": shape.width, "length": shape.length}
    row |= {"arguments, MB": given / 1e6, "all else, MB": rest / 1e6}
    if shape.policy != "nothing_saveable":
        return row | {"policy": shape.policy}
    shares = paper.arguments(shape, model, EACH), paper.temporary(shape, model)
    on_paper = [sum(each.values()) for each in shares]
    row |= {"on paper, MB": on_paper[0] / 1e6, "all else on paper, MB": on_paper[1] / 1e6}
    return row | {"paper / compiled": sum(on_paper) / (given + rest)}


def parameters(shape: Shape) -> int:
    """How many numbers θ has."""
    theta = jax.eval_shape(lambda key: decoder.parameters(shape, key), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(theta))


def policies() -> list[Row]:
    """Bytes beside the arguments of a decoder on one device, by what its layers keep."""
    rows = []
    for policy in POLICIES:
        program = program_of(KEEPING._replace(policy=policy), mesh_of(1, 1), 1)
        megabytes = temporary_megabytes(program)
        rows.append({"policy": policy, "MB": megabytes, "GFLOP": flops(program) / 1e9})
    return rows


def aims(tables: dict[str, list[Row]], checks: list[Row], total: float, memory: float) -> list[Row]:
    """What must hold."""
    shares = [r["in all, kB"] for r in tables["bytes"] if r["tasks × model"] == "· 8 / alone"]
    apart = max(row["apart"] for row in tables["gradient"])
    ratios = [row["paper / compiled"] for row in checks if "paper / compiled" in row]
    worst = max((abs(ratio - 1) for ratio in ratios), default=0.0)
    return [
        aim(
            "bytes of one device of 8, in eighths, worst", "≤ 1.2", max(shares), max(shares) <= 1.2
        ),
        aim("meta-gradient against one device, worst", "≤ 1e-4", apart, apart <= 1e-4),
        aim("bytes on paper against compiled, worst", "≤ 0.1", worst, worst <= 0.1),
        aim("GB a device on paper", f"≤ {memory:g}", total / 1e9, total / 1e9 <= memory),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the tables and the aims, write sharded.json."""
    parser = make_parser(__doc__, "sharded", quick="one mesh; the large program is not compiled")
    for name, default in LARGE._asdict().items():
        text = f"of the large decoder; default {default}"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    for name, default, text in (
        ("tasks-axis", 8, "devices that tasks are spread over"),
        ("model-axis", 8, "devices that share parameters and data"),
        ("memory", 80.0, "GB of a device"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    options: Any = parser.parse_args(arguments)
    tasks, model = options.tasks_axis, options.model_axis
    # before JAX is asked for any
    jax.config.update("jax_num_cpu_devices", max(8, 1 if options.quick else tasks * model))
    tables = measured(QUICK_MESHES if options.quick else MESHES)
    show(f"Bytes a device, {EACH} tasks in all", tables["bytes"])
    show("Messages in the program (a loop's once)", tables["messages"])
    show("Meta-gradient against one device, of its length", tables["gradient"])
    large = Shape(*(getattr(options, name) for name in Shape._fields))
    table, total = predicted(large, tasks, model)
    title = f"On paper: {parameters(large) / 1e9:.3g} billion parameters, a device's bytes"
    show(f"{title} (nothing_saveable, float32)", table)
    checks = [checked(shape, 1, 8) for shape in (CHECKS[:1] if options.quick else CHECKS)]
    if not options.quick:
        checks.append(checked(large, tasks, model))
    show("Compiled for simulated devices, and on paper", checks)
    kept = policies()
    show(f"What jax.checkpoint keeps of {KEEPING.layers} layers", kept)
    lines = aims(tables, checks, total, options.memory)
    show("Aims", lines)
    results = {"measured": tables, "paper": table, "checks": checks}
    results |= {"policies": kept, "aims": lines}
    write(options.out / "sharded.json", results)


if __name__ == "__main__":
    main()
