"""Problems whose hypergradient is known: the ground truth of the tests."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import memmeta as mm


class Quadratic(NamedTuple):
    r"""Tasks with g = ½ φᵀA_iφ − φᵀ(B_i θ) and f = ½‖φ − t_i‖² + ½‖θ‖², so φ* = A_i⁻¹ B_i θ."""

    hessian: jax.Array
    coupling: jax.Array
    target: jax.Array


def quadratic_tasks(
    key: jax.Array, tasks: int = 5, inner: int = 6, outer: int = 4, condition: float = 10.0
) -> Quadratic:
    keys = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (tasks, inner, inner)))[0]
    curvatures = jnp.geomspace(1.0, condition, inner)
    hessian = jnp.einsum("tij,j,tkj->tik", basis, curvatures, basis)
    coupling = jax.random.normal(keys[1], (tasks, inner, outer))
    return Quadratic(hessian, coupling, jax.random.normal(keys[2], (tasks, inner)))


def quadratic_problem(inner: int = 6, condition: float = 10.0) -> mm.Problem:
    def inner_loss(phi: jax.Array, context: Any) -> jax.Array:
        drive, batch, _ = context
        loss: jax.Array = 0.5 * phi @ batch.hessian @ phi - phi @ drive
        return loss

    def outer_loss(phi: Any, context: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, batch, theta = context
        return 0.5 * jnp.sum((phi - batch.target) ** 2) + 0.5 * jnp.sum(theta**2), {"phi": phi}

    return mm.Problem(
        embed=lambda theta, batch: (batch.coupling @ theta, batch, theta),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        init=lambda theta: jnp.zeros(inner, theta.dtype),
        smoothness=lambda context: jnp.asarray(condition, context[0].dtype),
        strong_convexity=lambda context: jnp.asarray(1.0, context[0].dtype),
    )


def quadratic_hypergradient(theta: jax.Array, tasks: Quadratic) -> jax.Array:
    """∇F = θ + mean_i B_iᵀ A_i⁻¹ (A_i⁻¹ B_i θ − t_i), in closed form."""
    phi = jnp.linalg.solve(tasks.hessian, (tasks.coupling @ theta)[..., None])[..., 0]
    v = jnp.linalg.solve(tasks.hessian, (phi - tasks.target)[..., None])[..., 0]
    return theta + jnp.mean(jnp.einsum("tij,ti->tj", tasks.coupling, v), axis=0)


class Example(NamedTuple):
    """A problem with meta-parameters and tasks to try estimators on."""

    problem: mm.Problem
    theta: Any
    tasks: Any


def quadratic_example(tasks: int = 3) -> Example:
    return Example(
        quadratic_problem(), jnp.linspace(-1.0, 1.0, 4), quadratic_tasks(jax.random.key(1), tasks)
    )


def logistic_example(tasks: int = 3, features: int = 4) -> Example:
    """Regularisation selection: θ holds the logarithm of one ridge per feature."""

    def losses(phi: jax.Array, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.softplus(-labels * (inputs @ phi)))

    def inner_loss(phi: jax.Array, context: Any) -> jax.Array:
        theta, batch = context
        penalty = 0.5 * jnp.sum(jnp.exp(theta) * phi**2)
        return losses(phi, batch.support_inputs, batch.support_targets) + penalty

    def outer_loss(phi: Any, context: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch = context[1]
        return losses(phi, batch.query_inputs, batch.query_targets), {}

    problem = mm.Problem(
        embed=lambda theta, batch: (theta, batch),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        init=lambda theta: jnp.zeros(features, theta.dtype),
        strong_convexity=lambda context: jnp.min(jnp.exp(context[0])),
    )
    return Example(problem, jnp.linspace(-1.5, -0.5, features), _labelled(tasks, features, 8))


def proximal_example(tasks: int = 4, features: int = 4, strength: float = 0.3) -> Example:
    """Logistic regression held to θ: context and start are θ, and μ is known."""

    def losses(phi: jax.Array, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.softplus(-labels * (inputs @ phi)))

    def inner_loss(phi: jax.Array, context: Any) -> jax.Array:
        theta, batch = context
        distance = 0.5 * strength * jnp.sum((phi - theta) ** 2)
        return losses(phi, batch.support_inputs, batch.support_targets) + distance

    def outer_loss(phi: Any, context: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return losses(phi, context[1].query_inputs, context[1].query_targets), {}

    problem = mm.Problem(
        embed=lambda theta, batch: (theta, batch),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        init=lambda theta: theta,
        strong_convexity=lambda context: jnp.asarray(strength, context[0].dtype),
    )
    return Example(problem, jnp.linspace(-1.5, -0.5, features), _labelled(tasks, features, 8))


def _labelled(tasks: int, features: int, samples: int) -> mm.Task:
    keys = jax.random.split(jax.random.key(2), 4)
    truth = jax.random.normal(keys[0], (tasks, features))

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = jax.random.normal(key, (tasks, samples, features))
        noise = jax.random.normal(jax.random.fold_in(key, 1), (tasks, samples))
        return inputs, jnp.sign(jnp.einsum("tsf,tf->ts", inputs, truth) + noise)

    return mm.Task(*draw(keys[1]), *draw(keys[2]))


def head_example(tasks: int = 3, ways: int = 3, support: int = 6, ridge: float = 0.1) -> Example:
    """A softmax head on tanh features; some support examples are padding."""

    def embed(theta: dict[str, jax.Array], batch: mm.Task) -> mm.few_shot.HeadContext:
        return mm.few_shot.HeadContext(
            jnp.tanh(batch.support_inputs @ theta["body"]),
            batch.support_targets,
            jnp.tanh(batch.query_inputs @ theta["body"]),
            batch.query_targets,
            (jnp.arange(support) < support - 1).astype(batch.support_inputs.dtype),
        )

    def init(theta: dict[str, jax.Array]) -> dict[str, jax.Array]:
        dtype = theta["body"].dtype
        return {"kernel": jnp.zeros((5, ways), dtype), "bias": jnp.zeros(ways, dtype)}

    keys = jax.random.split(jax.random.key(3), 3)
    batch = mm.Task(
        jax.random.normal(keys[0], (tasks, support, 4)),
        jnp.tile(jnp.arange(support) % ways, (tasks, 1)),
        jax.random.normal(keys[1], (tasks, 7, 4)),
        jnp.tile(jnp.arange(7) % ways, (tasks, 1)),
    )
    problem = mm.few_shot.softmax_problem(embed, init, ridge)
    return Example(problem, {"body": jax.random.normal(keys[2], (4, 5))}, batch)


def network_example(
    tasks: int = 3, hidden: int = 3, proximal: float = 1.0, samples: int = 6
) -> Example:
    """A small network that adapts whole, held to its start by a proximal term (iMAML)."""

    def predict(phi: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
        return (jnp.tanh(inputs @ phi["in"]) @ phi["out"])[..., 0]

    def inner_loss(phi: Any, context: Any) -> Any:
        theta, batch = context
        distance = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), phi, theta)
        error = predict(phi, batch.support_inputs) - batch.support_targets
        return jnp.mean(error**2) + 0.5 * proximal * sum(jax.tree.leaves(distance))

    def outer_loss(phi: Any, context: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch = context[1]
        error = predict(phi, batch.query_inputs) - batch.query_targets
        return jnp.mean(error**2), {"error": error}

    keys = jax.random.split(jax.random.key(4), 2)
    theta = {
        "in": 0.7 * jax.random.normal(keys[0], (2, hidden)),
        "out": 0.7 * jax.random.normal(keys[1], (hidden, 1)),
    }
    problem = mm.Problem(lambda t, batch: (t, batch), inner_loss, outer_loss, lambda t: t)
    return Example(problem, theta, _labelled(tasks, 2, samples))


EXAMPLES = {
    "quadratic": quadratic_example,
    "logistic": logistic_example,
    "head": head_example,
    "network": network_example,
}


def exact_hypergradient(example: Example, steps: int = 30) -> Any:
    """The implicit function theorem written out: dense Hessians at a solution to rounding."""
    flat, unravel = ravel_pytree(example.theta)
    start, unravel_phi = ravel_pytree(example.problem.init(example.theta))
    problem = example.problem

    def one_task(task: Any) -> jax.Array:
        def context(theta: jax.Array) -> Any:
            return problem.embed(unravel(theta), task)

        def slope(phi: jax.Array, theta: jax.Array) -> Any:
            loss = lambda phi: problem.inner_loss(unravel_phi(phi), context(theta))  # noqa: E731
            return jax.grad(loss)(phi)

        def outer(phi: jax.Array, theta: jax.Array) -> jax.Array:
            return problem.outer_loss(unravel_phi(phi), context(theta))[0]

        def newton(phi: jax.Array, _: None) -> tuple[jax.Array, None]:
            return phi - jnp.linalg.solve(jax.jacfwd(slope)(phi, flat), slope(phi, flat)), None

        inner = mm.InnerLoop(mm.inner.newton(None), steps=steps)
        phi = inner(problem, unravel_phi(start), context(flat))
        phi, _ = jax.lax.scan(newton, ravel_pytree(phi)[0], length=3)
        by_phi, by_theta = jax.grad(outer, argnums=(0, 1))(phi, flat)
        hessian, mixed = jax.jacfwd(slope, argnums=(0, 1))(phi, flat)
        gradient: jax.Array = by_theta - mixed.T @ jnp.linalg.solve(hessian, by_phi)
        return gradient

    return unravel(jnp.sum(jax.vmap(one_task)(example.tasks), axis=0))


def unrolled_hypergradient(example: Example, inner: mm.InnerLoop) -> Any:
    """`jax.grad` of the sum of the outer losses through the loop written as a Python loop."""
    problem = example.problem

    def total(theta: Any) -> jax.Array:
        def one_task(task: Any) -> jax.Array:
            context = problem.embed(theta, task)
            params = problem.init(theta)
            solver = inner.steps_of
            state = solver.init(problem, params, context)
            for step in range(inner.steps):
                params, state, _ = solver.update(
                    problem, params, state, context, jnp.int32(step), jax.random.key(0)
                )
            return problem.outer_loss(params, context)[0]

        return jnp.sum(jax.vmap(one_task)(example.tasks))

    return jax.grad(total)(example.theta)
