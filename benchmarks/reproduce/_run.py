"""One run: what a method's meta-step costs, its training, and both tests."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.stages import Compiled

from benchmarks.problems.as_released import (
    TEST_HEAD,
    TEST_ROUNDS,
    Method,
    Setting,
    fixed_head,
    learner,
    network,
)
from benchmarks.reproduce._data import read, sampler
from memmeta.data import HostDataset
from memmeta.few_shot import head_problem
from memmeta.inner import InnerLoop
from memmeta.meta import MetaState, confidence_interval, evaluate
from memmeta.problem import Batch, MetaParams, Problem
from memmeta.runs import checkpoints

SAVED_EVERY = 50
TIMED = 2


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run's numbers.

    Attributes:
        setting: of the data set.
        method: of the four.
        cached: see `learner`; a run with features made in every inner step is only measured, since
            it would train to the same numbers.
        tasks: in a meta-step.
        task_chunk: of them worked on at once.
        episodes: of the fair test.
        seed: of the start, the tasks and the fixed head.
        data_dir: None for embedded data.
    """

    setting: Setting
    method: Method
    cached: bool
    tasks: int
    task_chunk: int
    episodes: int
    seed: int
    data_dir: Path | None

    @property
    def name(self) -> str:
        """Of the run's folder and result."""
        kind = "cached" if self.cached else "released"
        setting = self.setting
        numbers = (setting.width, setting.iterations, self.tasks, self.seed)
        return "-".join(map(str, (setting.data, self.method, kind, *numbers)))


def run(plan: Plan, folder: Path) -> dict[str, Any]:
    """Measure, train from where an interrupted run stopped, and test.

    Args:
        plan: of the run.
        folder: of its checkpoints.

    Returns:
        A line of the table.
    """
    train = read(plan.setting, "train", plan.data_dir)
    made = learner(plan.setting, plan.method, plan.seed, cached=plan.cached)
    optimizer = optax.adam(plan.setting.outer_rate)
    step = made.make_meta_step(optimizer, task_chunk=plan.task_chunk, guard=None)
    state = step.init(jax.jit(made.init)(jax.random.key(plan.seed)))
    tasks = sampler(train).sample_batch(train, jax.random.key(0), plan.tasks)
    program = jax.jit(step.update).lower(state, tasks).compile()
    result = {"data": plan.setting.data, "method": plan.method, "cached": plan.cached}
    result |= cost(program, state, tasks)
    if not plan.cached:
        return result
    theta = trained(plan, program, state, train, folder)
    test, head = read(plan.setting, "test", plan.data_dir), theta.get("head")
    model = network(plan.setting)
    start = fixed_head(model, plan.seed) if head is None else head
    frozen = head_problem(model, 0.0, False, "separate", start)
    body = {"body": theta["body"]}
    rounds = TEST_ROUNDS * plan.tasks
    return result | {
        "theirs": accuracy(plan, frozen, TEST_HEAD, body, test, rounds),
        "fair": accuracy(plan, made.problem, made.inner, theta, test, plan.episodes),
    }


def cost(program: Compiled, state: MetaState, tasks: Batch) -> dict[str, Any]:
    """Seconds and megabytes of a meta-step, the compiler's where the device does not count them."""
    jax.block_until_ready(program(state, tasks))
    begin = time.perf_counter()
    for _ in range(TIMED):
        jax.block_until_ready(program(state, tasks))
    seconds = (time.perf_counter() - begin) / TIMED
    counted = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    compiled = getattr(program.memory_analysis(), "temp_size_in_bytes", 0)
    memory = compiled if counted is None else counted
    return {"seconds": seconds, "megabytes": memory / 1e6, "counted": counted is not None}


def trained(
    plan: Plan, program: Compiled, state: MetaState, train: HostDataset, folder: Path
) -> MetaParams:
    """θ after all meta-steps, from the newest checkpoint if there is one."""
    episodes = sampler(train)
    if checkpoints.whole(folder):
        state = checkpoints.restore(folder, state)
    for number in range(int(state.step), plan.setting.iterations):
        key = jax.random.fold_in(jax.random.key(plan.seed), number)
        state, metrics = program(state, episodes.sample_batch(train, key, plan.tasks))
        done = number + 1
        if done % SAVED_EVERY == 0 or done == plan.setting.iterations:
            print(f"{plan.name}: meta-step {done}, loss {float(metrics.loss):.3f}", flush=True)
            checkpoints.save(folder, done, state)
    return state.meta_params


def accuracy(
    plan: Plan, problem: Problem, inner: InnerLoop, theta: MetaParams, test: HostDataset, count: int
) -> tuple[float, float]:
    """Mean accuracy on test tasks in %, and the half-width of its 95 % interval."""

    @jax.jit
    def judged(theta: MetaParams, tasks: Batch) -> jax.Array:
        return evaluate(problem, inner, theta, tasks, plan.task_chunk).aux["accuracy"]

    drawn, key, found = sampler(test), jax.random.key(plan.seed), []
    for first in range(0, count, plan.tasks):
        found.append(np.asarray(judged(theta, drawn.sample_batch(test, key, plan.tasks, first))))
    interval = confidence_interval(100 * np.concatenate(found)[:count])
    return interval.mean, interval.half_width
