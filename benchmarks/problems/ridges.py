"""One ridge for each of ten features, learned: the smallest whole meta-step, and it by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import memmeta as mm
from benchmarks.harness.programs import flops, instructions, temporary_megabytes

FEATURES, EXAMPLES = 10, 20
TASKS, STEPS, PRODUCTS = 4, 20, 20
RATE, OUTER_RATE = 0.1, 1e-2
BY_HAND = "by hand"
LEVELS = "none", "light", "full"
Ridges = Float[Array, "features"]
State = tuple[Ridges, optax.OptState]


def batch() -> mm.Task:
    """Linear regressions with noise; only some of the features count."""
    keys = jax.random.split(jax.random.key(0), 5)
    truth = jax.random.normal(keys[0], (TASKS, FEATURES)).at[:, ::2].set(0)

    def draw(inputs: Array, noise: Array) -> tuple[Array, Array]:
        x = jax.random.normal(inputs, (TASKS, EXAMPLES, FEATURES))
        y = jnp.einsum("tef,tf->te", x, truth)
        return x, y + 0.5 * jax.random.normal(noise, y.shape)

    return mm.Task(*draw(keys[1], keys[2]), *draw(keys[3], keys[4]))


def inner_loss(phi: Array, context: tuple[Ridges, mm.Task]) -> Array:
    """g = ½ mean (xᵀφ − y)² + ½ Σ_j exp(θ_j) φ_j², on the support examples."""
    theta, task = context
    misfit = task.support_inputs @ phi - task.support_targets
    return 0.5 * jnp.mean(misfit**2) + 0.5 * jnp.sum(jnp.exp(theta) * phi**2)


def outer_loss(phi: Array, context: tuple[Ridges, mm.Task]) -> tuple[Array, dict[str, Array]]:
    """f = ½ mean (xᵀφ − y)², on the query examples."""
    task = context[1]
    misfit = task.query_inputs @ phi - task.query_targets
    return 0.5 * jnp.mean(misfit**2), {}


def meta_step(report: Any = "light", **options: Any) -> mm.MetaStep:
    """The library's meta-step: gradient descent inside, Adam outside."""
    problem = mm.Problem(
        embed=lambda theta, task: (theta, task),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        init=lambda theta: jnp.zeros_like(theta),
    )
    inner = mm.InnerLoop(optax.sgd(RATE), STEPS)
    estimator = mm.hypergradient.implicit(mm.linear_solve.cg(PRODUCTS))
    optimizer = optax.adam(OUTER_RATE)
    return mm.make_meta_step(problem, inner, estimator, optimizer, report=report, **options)


def start() -> Ridges:
    """θ, the logarithms of the ridges."""
    return jnp.full(FEATURES, -3.0)


Step = Callable[[State, mm.Task], tuple[State, Array]]


def by_hand() -> tuple[Callable[[Ridges], State], Step]:
    """(init, step) of the same meta-step in plain JAX: no guard, no mask, no report but a loss."""
    optimizer = optax.adam(OUTER_RATE)

    def one_task(theta: Ridges, task: mm.Task) -> tuple[Array, Ridges]:
        context = theta, task
        slope = jax.grad(inner_loss)

        def descend(_: Any, phi: Array) -> Array:
            return phi - RATE * slope(phi, context)

        phi = jax.lax.fori_loop(0, STEPS, descend, jnp.zeros(FEATURES))
        loss, right = jax.value_and_grad(lambda phi: outer_loss(phi, context)[0])(phi)

        def product(u: Array) -> Array:
            return jax.jvp(lambda phi: slope(phi, context), (phi,), (u,))[1]

        v = conjugate_gradients(product, right)
        mixed = jax.grad(lambda theta: jnp.vdot(slope(phi, (theta, task)), v))(theta)
        return loss, -mixed

    def step(state: State, tasks: mm.Task) -> tuple[State, Array]:
        theta, moments = state
        losses, gradients = jax.vmap(one_task, (None, 0))(theta, tasks)
        updates, moments = optimizer.update(jnp.mean(gradients, axis=0), moments, theta)
        return (theta + updates, moments), jnp.mean(losses)

    return lambda theta: (theta, optimizer.init(theta)), step


def conjugate_gradients(product: Callable[[Array], Array], b: Array) -> Array:
    """`PRODUCTS` steps from zero; stays where it is once the residual is zero."""

    def body(carry: Any, _: None) -> tuple[Any, None]:
        x, r, p, rr = carry
        image = product(p)
        quadratic = jnp.vdot(p, image)
        alpha = jnp.where(quadratic > 0, rr / jnp.where(quadratic > 0, quadratic, 1), 0)
        x, r = x + alpha * p, r - alpha * image
        following = jnp.vdot(r, r)
        beta = jnp.where(rr > 0, following / jnp.where(rr > 0, rr, 1), 0)
        return (x, r, r + beta * p, following), None

    (x, *_), _ = jax.lax.scan(body, (jnp.zeros_like(b), b, b, jnp.vdot(b, b)), length=PRODUCTS)
    return x


def steps() -> dict[str, tuple[Any, Any]]:
    """Of the ridge problem: each step, not yet traced, and its first state."""
    init, hand = by_hand()
    found: dict[str, tuple[Any, Any]] = {
        # of its own each time: `jax.jit` keeps the program of a function that it has met
        BY_HAND: (jax.jit(lambda *given: hand(*given), donate_argnums=0), init(start()))
    }
    for level in LEVELS:
        made = meta_step(level)
        found[level] = made, made.init(start())
    return found


def counts() -> dict[str, dict[str, Any]]:
    """Of each of the `steps`: what does not depend on the clock."""
    tasks = jax.eval_shape(batch)
    found = {}
    for name, (step, state) in steps().items():
        lowered = getattr(step, "compiled", step).lower(state, tasks)
        program = lowered.compile()
        found[name] = {
            "StableHLO": len(lowered.as_text().splitlines()),
            "HLO": instructions(program),
            "FLOPs": flops(program),
            "bytes": round(temporary_megabytes(program) * 1e6),
        }
    return found
