"""One method on one setting: compiled once, its meta-steps counted out by the clock, seed by seed.

seconds of training -> meta-steps -> accuracy or error on held-out tasks
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32, Key

import memmeta as mm
from benchmarks.accuracy import regression
from benchmarks.accuracy.settings import Preset, Setting, Sizes, Split, make_learner, recipe_of
from benchmarks.harness.programs import compiled, temporary_megabytes
from memmeta.few_shot import Statistics
from memmeta.few_shot.algorithms import Learner
from memmeta.meta import confidence_interval
from memmeta.problem import MetaParams, Task

BASELINE = "gaussian_process"
MEASURED = 1.0  # seconds of meta-steps from which their number is worked out
CHUNK = 20  # test tasks worked on at once

Record = dict[str, Any]


class Job(NamedTuple):
    """One method, or `BASELINE`, on one setting, by one recipe; `split` has the tasks at test."""

    setting: Setting
    sizes: Sizes
    method: Any
    preset: Preset
    split: str

    @property
    def quick(self) -> bool:
        """Whether seconds are saved in the compiler."""
        return self.sizes.meta_steps is not None

    def identity(self, seed: int) -> Record:
        """What a result is of: a finished one is not run again."""
        found = {"method": self.method, "preset": self.preset, "split": self.split, "seed": seed}
        return {**self.setting._asdict(), **found, "sizes": self.sizes._asdict()}


def clock() -> float:
    """Seconds of the processor where one core does all the work, else of the wall.

    On one core the first do not count what other programs take.
    """
    one_core = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1
    one_thread = "xla_cpu_multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", "")
    on_cpu = jax.default_backend() == "cpu"
    return time.process_time() if on_cpu and (one_core or one_thread) else time.perf_counter()


@cache
def _load(data: str, split: str, data_dir: str | None) -> Split:
    return mm.data.load(data, split, data_dir)


def _tasks(job: Job, dataset: Split, queries: int) -> Callable[..., Task]:
    setting = job.setting
    made: Any = mm.data.sampler(dataset, ways=setting.ways, shots=setting.shots, queries=queries)
    made.check(dataset)
    return made.sample_batch


def train_program(job: Job, learner: Learner, dataset: Split) -> tuple[Any, Callable]:
    """(state, data, count, total) -> (state, sums): `count` of `total` meta-steps, and the start.

    Both numbers are traced, so that one compilation serves the clock, every seed and every budget;
    the rate is therefore set in the optimiser's state at each step.
    """
    recipe = recipe_of(job.preset, job.setting, job.method)
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=recipe.rate)
    step = learner.make_meta_step(optimizer, task_chunk=job.sizes.chunk)
    sample = _tasks(job, dataset, job.sizes.queries)

    def start(key: Key[Array, ""]) -> mm.MetaState:
        return step.init(learner.init(jax.random.fold_in(key, 0)), jax.random.fold_in(key, 1))

    @partial(jax.jit, donate_argnums=0)
    def block(
        state: mm.MetaState, dataset: Split, count: Int32[Array, ""], total: Int32[Array, ""]
    ) -> tuple[mm.MetaState, dict[str, Array]]:
        def one(state: mm.MetaState) -> tuple[mm.MetaState, dict[str, Array]]:
            share = state.step.astype(jnp.float32) / total.astype(jnp.float32)
            fall = 0.5 * (1 + jnp.cos(jnp.pi * share)) if recipe.cosine else jnp.ones_like(share)
            rates = state.optimizer.hyperparams | {"learning_rate": recipe.rate * fall}
            state = state._replace(optimizer=state.optimizer._replace(hyperparams=rates))
            tasks = sample(dataset, jax.random.fold_in(state.key, state.step), job.sizes.tasks)
            state, metrics = step.update(state, tasks)
            return state, {"loss": metrics.loss, **metrics.counts.as_dict()}

        def body(_: Array, carry: tuple[mm.MetaState, dict[str, Array]]) -> tuple:
            state, found = one(carry[0])
            return state, jax.tree.map(jnp.add, carry[1], found)

        zeros = jax.tree.map(
            lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(one, state)[1]
        )
        return jax.lax.fori_loop(0, count, body, (state, zeros))

    shape = jax.eval_shape(start, jax.random.key(0))
    arguments = (shape, dataset, jnp.int32(1), jnp.int32(1))
    return compiled(block, *arguments, quick=job.quick), start


def meta_steps_in(seconds: float, run: Callable[[int], None]) -> int:
    """How many meta-steps fit into so many seconds; `run` makes a number of them and waits."""
    run(1)
    count, spent = 1, 0.0
    while spent < MEASURED:
        count *= 2
        began = clock()
        run(count)
        spent = clock() - began
    return max(1, round(seconds * count / spent))


def adapted(
    problem: mm.Problem, inner: mm.InnerLoop, theta: MetaParams, context: Any, stages: int
) -> Any:
    """φ after T, 2 T, ... inner steps, along a leading axis of so many stages."""

    def stage(state: Any, _: None) -> tuple[Any, Any]:
        # a number of steps that the compiler does not know keeps the loop from being unrolled
        steps = jax.lax.optimization_barrier(jnp.int32(inner.steps))
        advance = lambda _, s: inner.advance(problem, s, context, jax.random.key(0), 1)  # noqa: E731
        state = jax.lax.fori_loop(0, steps, advance, state)
        return state, state.params

    begun = inner.start(problem, problem.init(theta), context)
    return jax.lax.scan(stage, begun, length=stages)[1]


def evaluate_task(
    learners: dict[Statistics, Learner], inner: mm.InnerLoop, theta: MetaParams, task: Task
) -> dict[str, Float[Array, " stages"]]:
    """The query figure of one task, by batch statistics, after each stage of inner steps."""
    found: dict[str, Array] = {}
    answers, stages = None, 2 if inner.steps else 1
    for kind, learner in learners.items():
        problem = learner.problem
        context = problem.embed(theta, task)
        # Heads adapt on features, which depend on the statistics. Networks adapt on the support
        # images alone: once for both kinds, which differ in the query pass.
        if answers is None or problem.structure is not None:
            answers = adapted(problem, inner, theta, context, stages)
        found[kind] = jax.lax.map(partial(_figure, problem, context, answers), jnp.arange(stages))
    return found


def _figure(
    problem: mm.Problem, context: Any, answers: Any, stage: Int32[Array, ""]
) -> Float[Array, ""]:
    """The query figure of the adapted parameters of one stage."""
    aux = problem.outer_loss(jax.tree.map(lambda x: x[stage], answers), context)[1]
    return aux["error"] if "error" in aux else aux["accuracy"]


def evaluation_program(job: Job, dataset: Split) -> Callable[[MetaParams, Split], dict[str, Any]]:
    """(θ, data) -> mean query figure of all test tasks, by batch statistics and inner steps.

    One program: the inner loop goes on from T to 2 T steps.
    """
    recipe = recipe_of(job.preset, job.setting, job.method)
    kinds: tuple[Statistics, ...] = (recipe.statistics,)
    learners = {
        kind: make_learner(job.setting, job.sizes, dataset, job.method, recipe, kind)
        for kind in (kinds if job.setting.curves else (*kinds, "support"))
    }
    first = next(iter(learners.values()))
    inner = recipe.test or first.inner
    sample = _tasks(job, dataset, job.sizes.test_queries)

    def all_tasks(theta: MetaParams, dataset: Split) -> dict[str, Float[Array, "tasks stages"]]:
        def one(number: Int32[Array, ""]) -> dict[str, Array]:
            # the same tasks whatever the seed and the method, so that they can be compared
            task = jax.tree.map(lambda x: x[0], sample(dataset, jax.random.key(0), 1, number))
            return evaluate_task(learners, inner, theta, task)

        numbers = jnp.arange(job.sizes.episodes, dtype=jnp.int32)
        return jax.lax.map(one, numbers, batch_size=min(CHUNK, job.sizes.episodes))

    shape = jax.eval_shape(first.init, jax.random.key(0))
    program = compiled(all_tasks, shape, dataset, quick=job.quick)

    def figures(theta: MetaParams, dataset: Split) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind, values in jax.tree.map(np.asarray, program(theta, dataset)).items():
            stages = [confidence_interval(column)._asdict() for column in values.T]
            found[kind] = {str(inner.steps * k): stage for k, stage in enumerate(stages, 1)}
        return found

    return figures


def results(
    job: Job, seeds: Sequence[int], data_dir: str | None, meta_steps: int | None = None
) -> Iterator[Record]:
    """Train and test one method; yields one record a seed, ready for JSON.

    Args:
        job: what to run.
        seeds: those that are not finished.
        data_dir: folder of data sets that are not embedded.
        meta_steps: as finished seeds made; None: as the clock says.
    """
    train, test = (_load(job.setting.data, split, data_dir) for split in ("train", job.split))
    if job.method == BASELINE:
        yield from (baseline(job, seed, test) for seed in seeds[:1])
        return
    recipe = recipe_of(job.preset, job.setting, job.method)
    learner = make_learner(job.setting, job.sizes, train, job.method, recipe)
    began = clock()
    block, start = train_program(job, learner, train)
    compiling = clock() - began

    def run(count: int) -> None:
        jax.block_until_ready(block(start(jax.random.key(0)), train, *map(jnp.int32, (count, 1))))

    count = job.sizes.meta_steps or meta_steps or meta_steps_in(job.sizes.seconds, run)
    evaluate = evaluation_program(job, test)
    for seed in seeds:
        state, began = start(jax.random.key(seed)), clock()
        state, sums = jax.block_until_ready(block(state, train, *map(jnp.int32, (count, count))))
        trained = clock()
        figures = evaluate(state.meta_params, test)
        yield job.identity(seed) | {
            "meta_steps": count,
            "seconds": trained - began,
            "compile_seconds": compiling,
            "test_seconds": clock() - trained,
            "temporary_megabytes": temporary_megabytes(block),
            "test_steps_of_training": str(learner.inner.steps),
            "training_loss": float(sums.pop("loss")) / count,
            "counts": {name: int(number) for name, number in sums.items()},
            "figures": figures,
        }


def baseline(job: Job, seed: int, dataset: Split) -> Record:
    """The Gaussian process on the same tasks; it learns nothing from others."""
    sample = _tasks(job, dataset, job.sizes.test_queries)
    tasks = jax.jit(sample, static_argnums=(2,))(dataset, jax.random.key(0), job.sizes.episodes)
    errors = jax.jit(partial(jax.lax.map, regression.gaussian_process, batch_size=CHUNK))(tasks)
    found = confidence_interval(np.asarray(errors))._asdict()
    return job.identity(seed) | {"figures": {"transductive": {"0": found}}}
