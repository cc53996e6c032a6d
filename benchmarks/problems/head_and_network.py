"""Two few-shot problems that estimators are compared on: a linear head, and a whole network.

Both are strongly convex enough, or held to θ firmly enough, that gradient descent goes from far off
to rounding as T goes from 1 to 1000.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

import memmeta as mm
from memmeta.few_shot import HeadContext, softmax_problem
from memmeta.problem import Params, Problem, Scalar, Task

TASKS, INPUTS, SAMPLES = 4, 6, 60
WAYS, FEATURES, RIDGE = 5, 24, 0.05
HIDDEN, PROXIMAL = 16, 0.5


class Example(NamedTuple):
    """A problem, meta-parameters and a batch of tasks."""

    problem: Problem
    theta: Any
    tasks: Any


def heads() -> Example:
    """A softmax head of 125 parameters on 24 features; θ is the 144 parameters of their body."""

    def embed(theta: Array, task: Task) -> HeadContext:
        support, query = (jnp.tanh(x @ theta) for x in (task.support_inputs, task.query_inputs))
        return HeadContext(support, task.support_targets, query, task.query_targets)

    def init(theta: Array) -> Params:
        dtype = theta.dtype
        return {"kernel": jnp.zeros((FEATURES, WAYS), dtype), "bias": jnp.zeros(WAYS, dtype)}

    keys = jax.random.split(jax.random.key(0), 3)
    support = 5 * WAYS
    labels = jnp.broadcast_to(jnp.arange(2 * support) % WAYS, (TASKS, 2 * support))
    centres = jax.random.normal(keys[0], (TASKS, WAYS, INPUTS))
    inputs = jax.vmap(lambda c, y: c[y])(centres, labels)
    inputs += 0.7 * jax.random.normal(keys[1], inputs.shape)
    tasks = Task(inputs[:, :support], labels[:, :support], inputs[:, support:], labels[:, support:])
    theta = 0.5 * jax.random.normal(keys[2], (INPUTS, FEATURES))
    return Example(softmax_problem(embed, init, RIDGE), theta, tasks)


def networks() -> Example:
    """A network of 112 parameters that adapts whole, held to θ by a proximal term (iMAML)."""

    def error(phi: Params, inputs: Array, targets: Array) -> Scalar:
        outputs = jnp.tanh(inputs @ phi["in"]) @ phi["out"]
        return jnp.mean((outputs - targets) ** 2)

    def inner_loss(phi: Params, context: tuple[Params, Task]) -> Scalar:
        theta, task = context
        squares = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), phi, theta)
        pull = 0.5 * PROXIMAL * sum(jax.tree.leaves(squares))
        return error(phi, task.support_inputs, task.support_targets) + pull

    def outer_loss(phi: Params, context: tuple[Params, Task]) -> tuple[Scalar, dict]:
        return error(phi, context[1].query_inputs, context[1].query_targets), {}

    keys = jax.random.split(jax.random.key(1), 4)
    inputs = jax.random.normal(keys[0], (TASKS, 2 * SAMPLES, INPUTS))
    waves = jax.random.normal(keys[1], (TASKS, INPUTS))
    targets = jnp.sin(jnp.einsum("tsi,ti->ts", inputs, waves))
    shapes = {"in": (INPUTS, HIDDEN), "out": (HIDDEN,)}
    draws = zip(keys[2:], shapes.items(), strict=True)
    theta = {name: 0.5 * jax.random.normal(key, shape) for key, (name, shape) in draws}
    halves = slice(None, SAMPLES), slice(SAMPLES, None)
    tasks = Task(*(x[:, half] for half in halves for x in (inputs, targets)))
    problem = mm.Problem(lambda t, task: (t, task), inner_loss, outer_loss, lambda t: t)
    return Example(problem, theta, tasks)


def exact_hypergradient(example: Example, steps: int = 20_000) -> tuple[Any, float]:
    """Σ_i ∇F_i in float64, by long gradient descent and a dense solve.

    Returns:
        The gradient, and the largest ‖∇_φ g‖ that was left of a task.
    """
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
            (example.theta, example.tasks),
        )
        inner = mm.InnerLoop(mm.inner.gradient_descent(), steps)
        estimator = mm.hypergradient.implicit(mm.linear_solve.direct())

        def call(theta: Any, tasks: Task) -> tuple[Any, Array]:
            found = estimator(example.problem, inner, theta, mm.hypergradient.Chunk.of(tasks))
            return found.gradient, jnp.max(jnp.asarray(found.report.inner_gradient_norm))

        gradient, left = jax.jit(call)(*wide)
    return gradient, float(left)
