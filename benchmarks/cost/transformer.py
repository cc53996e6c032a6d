"""A causal transformer whose adapters are learned by each task: the implicit rule and unrolling.

    python -m benchmarks.cost.transformer [--steps 1 10 100] [--layers 4] [--width 256] [--rank 4]
        [--tasks 4] [--meta-steps 4] [--unrolled-to 10] [--out DIR]

In-context regression (see `benchmarks.problems.transformer`). All begin at the same network,
trained plainly for a while; then each rule at each number T of inner steps makes its own meta-steps
on the same batches, in turn, so that their seconds can be compared. "MB" are the temporary buffers
of the compiled meta-step, a task at a time, Adam and the guard included; "plain fine-tuning" is a
step of Adam on all parameters, on the same sequences at once. Errors are mean squares on tasks held
out, before and after T inner steps, with 95 % intervals over them. Unrolled loops longer than
`--unrolled-to` are compiled and not run. Writes transformer.json.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import memmeta as mm
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import compiled, temporary_megabytes, two_at_a_time
from benchmarks.harness.tables import Row, aim, show, write
from benchmarks.harness.timing import in_turn
from benchmarks.problems.transformer import (
    RULES,
    Functions,
    Rule,
    learner,
    plain_loss,
    transformer,
    with_adapters,
)
from memmeta.few_shot.algorithms import Learner
from memmeta.models import Network
from memmeta.problem import Task

PLAIN, START = "plain fine-tuning", "no meta-step"
FIRST_RATE, META_RATE = 1e-3, 3e-4
TRAIN, TEST, HEALTH = 1, 2, 3
"""Keys of the tasks of each kind."""

Name: TypeAlias = tuple[Rule, int]
"""A rule and its T."""


class Setting(NamedTuple):
    """What all programs share."""

    network: Network  # without adapters
    rank: int
    tasks: int  # of a meta-step
    functions: Functions = Functions()

    def batch(self, number: int) -> Task:
        """The tasks of a meta-step."""
        key = jax.random.fold_in(jax.random.key(TRAIN), number)
        return self.functions.sample_batch(key, self.tasks)

    def shapes(self) -> Task:
        """Those tasks without their data."""
        return jax.eval_shape(lambda: self.batch(0))

    def learner(self, name: Name) -> Learner:
        """A rule's."""
        return learner(with_adapters(self.network, self.rank), *name)

    def meta_step(self, name: Name, **options: Any) -> mm.MetaStep:
        """A rule's meta-step, a task at a time."""
        made = self.learner(name)
        return made.make_meta_step(optax.adam(META_RATE), task_chunk=1, **options)


class Plain:
    """Steps of Adam on all parameters, on all sequences of a batch of tasks at once."""

    def __init__(self, setting: Setting, optimizer: Any) -> None:
        self.setting, self.optimizer = setting, optimizer

    def update(self, state: tuple[Any, Any], tasks: Task) -> tuple[tuple[Any, Any], jax.Array]:
        """One step."""
        params, inside = state
        value_and_gradient = jax.value_and_grad(plain_loss, argnums=1)
        loss, gradient = value_and_gradient(self.setting.network, params, tasks)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, inside = self.optimizer.update(gradient, inside)
            return (optax.apply_updates(params, updates), inside), loss

    def program(self) -> jax.stages.Compiled:
        """The step, compiled, its state donated."""
        jitted = jax.jit(self.update, donate_argnums=0)
        return compiled(jitted, jax.eval_shape(self.start), self.setting.shapes(), quick=False)

    def start(self, params: Any = None) -> tuple[Any, Any]:
        """The first state, by default of a random network."""
        params = self.setting.network.init(jax.random.key(0)) if params is None else params
        return jax.tree.map(jnp.copy, params), self.optimizer.init(params)


def trained_plainly(setting: Setting, steps: int) -> Any:
    """Where all begin: the parameters after some plain steps on batches of their own."""
    plain = Plain(setting, optax.adam(optax.cosine_decay_schedule(FIRST_RATE, max(steps, 1))))
    program, state, batch = plain.program(), plain.start(), jax.jit(setting.batch)
    for number in range(steps):
        state, _ = program(state, batch(-1 - number))
    return state[0]


def programs(setting: Setting, names: list[Name]) -> dict[Any, jax.stages.Compiled]:
    """Every meta-step, and the step of plain fine-tuning."""

    def meta(name: Name) -> jax.stages.Compiled:
        step = setting.meta_step(name)
        state = jax.eval_shape(lambda: step.init(setting.learner(name).init(jax.random.key(0))))
        return compiled(step.compiled, state, setting.shapes(), quick=False)

    calls: dict[Any, Callable[[], Any]] = {name: partial(meta, name) for name in names}
    return two_at_a_time({PLAIN: Plain(setting, optax.adam(META_RATE)).program, **calls})


class Run:
    """One program that makes its own steps on the batches that all meet."""

    def __init__(self, program: Any, state: Any, batches: list[Task]) -> None:
        self.program, self.state, self.batches, self.made = program, state, batches, 0
        self.last: Any = None

    def __call__(self) -> None:
        """One step."""
        self.state, self.last = self.program(self.state, self.batches[self.made])
        self.made += 1
        jax.block_until_ready((self.state, self.last))


class HeldOut:
    """Mean squares of tasks that no step has met, after any number of inner steps."""

    def __init__(self, setting: Setting, count: int) -> None:
        self.setting = setting
        self.tasks = setting.functions.sample_batch(jax.random.key(TEST), count)

        self.programs: dict[int, Any] = {}

    def __call__(self, theta: Any, steps: int) -> str:
        """The mean, and its interval; both rules adapt alike, by the same program."""
        if steps not in self.programs:
            evaluate = self.setting.learner(("implicit", steps)).evaluate
            self.programs[steps] = jax.jit(lambda theta: evaluate(theta, self.tasks, task_chunk=1))
        return str(mm.confidence_interval(np.asarray(self.programs[steps](theta).loss)))


def health(setting: Setting, name: Name, run: Run) -> Row:
    """How far a rule's hypergradient can be trusted: at its last θ; unrolled, of its last step."""
    metrics = run.last
    row: Row = {"rule": name[0], "T": name[1]}
    if name[0] == "implicit":
        gradient = setting.meta_step(name, report="full").gradient
        tasks = setting.functions.sample_batch(jax.random.key(HEALTH), setting.tasks)
        _, metrics = compiled(gradient, run.state, tasks)(run.state, tasks)
    report = metrics.report
    row |= {"‖∇g‖": float(report.inner_gradient_norm), "share": float(report.inner_reduction)}
    if report.linear_residual is not None:
        row["linear residual"] = float(report.linear_residual)
        row["smallest curvature"] = float(report.smallest_curvature)
        row["error / ‖∇F‖"] = float(report.error_estimate / metrics.gradient_norm)
    return row


def measured(setting: Setting, names: list[Name], options: Any) -> tuple[list[Row], list[Row]]:
    """A row for each program, and the health figures of those that were run."""
    found = programs(setting, names)
    sizes = {name: temporary_megabytes(program) for name, program in found.items()}
    show("MB", [{"program": str(name), "MB": megabytes} for name, megabytes in sizes.items()])
    base = trained_plainly(setting, options.first_steps)
    adapters = with_adapters(setting.network, setting.rank).init(jax.random.key(0))["body"]["lora"]

    def whole(params: Any) -> Any:
        body = {"base": params["body"], "lora": adapters}
        return jax.tree.map(jnp.copy, {"body": body, "head": params["head"]})

    batches = [jax.jit(setting.batch)(number) for number in range(options.meta_steps)]
    plain = Plain(setting, optax.adam(META_RATE)).start(base)
    runs: dict[Any, Run] = {PLAIN: Run(found[PLAIN], plain, batches)}
    for rule, steps in names:
        if rule == "implicit" or steps <= options.unrolled_to:
            state = setting.meta_step((rule, steps)).init(whole(base))
            runs[rule, steps] = Run(found[rule, steps], state, batches)
    seconds = in_turn(runs, options.meta_steps)

    error = HeldOut(setting, options.held_out)
    rows = []
    for name, megabytes in sizes.items():
        title, steps = (PLAIN, 0) if name == PLAIN else name
        row: Row = {"rule": title, "T": steps or "", "MB": megabytes}
        row["of plain"] = megabytes / sizes[PLAIN]
        row |= {"seconds": "not run", "before": "", "after": ""}
        if name in runs:
            state = runs[name].state
            theta = whole(state[0]) if name == PLAIN else state.meta_params
            row |= {"seconds": float(np.median(seconds[name])), "before": error(theta, 0)}
            row["after"] = error(theta, steps) if steps else ""
        rows.append(row)
    begun, before = whole(base), error(whole(base), 0)
    for steps in options.steps:
        rows.append({"rule": START, "T": steps, "before": before, "after": error(begun, steps)})
    return rows, [health(setting, name, runs[name]) for name in names if name in runs]


def aims(rows: list[Row]) -> list[Row]:
    """What memory was to be."""
    megabytes = {(row["rule"], row["T"]): row["MB"] for row in rows if "MB" in row}
    counts = [steps for rule, steps in megabytes if rule == "implicit"]
    low, high = megabytes["implicit", min(counts)], megabytes["implicit", max(counts)]
    growth, share = high / low, high / megabytes[PLAIN, ""]
    return [
        aim(f"MB, T = {max(counts)} over T = {min(counts)}", "1.00", growth, growth < 1.005),
        aim(f"MB, T = {max(counts)} over plain fine-tuning", "≤ 1.5", share, share <= 1.5),
    ]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure and print; returns the rows."""
    parser = make_parser(__doc__, "transformer")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10, 100], help="T")
    for name, default, text in (
        ("layers", 4, "of the transformer"),
        ("width", 256, "of the transformer"),
        ("rank", 4, "of the adapters"),
        ("points", 16, "of a sequence"),
        ("tasks", 4, "of a meta-step"),
        ("meta-steps", 4, "of each rule"),
        ("first-steps", 200, "plain ones, before all"),
        ("held-out", 16, "tasks that errors are measured on"),
        ("unrolled-to", 10, "longest loop that is unrolled and run"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    options = parser.parse_args(arguments)
    network = transformer(options.layers, options.width, options.points)
    setting = Setting(network, options.rank, options.tasks, Functions(points=options.points))
    names = [(rule, steps) for rule in RULES for steps in options.steps]
    rows, figures = measured(setting, names, options)
    show(f"{options.tasks} tasks on {jax.default_backend()}, jax {jax.__version__}", rows)
    show("Health", figures)
    lines = aims(rows)
    show("Aims", lines)
    results = {"rows": rows, "health": figures, "aims": lines}
    write(options.out / "transformer.json", results)
    return rows


if __name__ == "__main__":
    main()
