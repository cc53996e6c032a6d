"""Settings proposed from measured constants, with the guarantee they rest on.

    python -m benchmarks.convergence.proposal [--width W] [--accuracy E]

On the quadratic and on glyphs with a Conv4; each is then run as proposed and the promise checked.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import memmeta as mm
from benchmarks.convergence.fits import over_seeds
from benchmarks.harness.arguments import make_parser
from benchmarks.problems.glyphs import features, glyph_tasks
from benchmarks.problems.quadratic import Family
from memmeta.few_shot import head_problem
from memmeta.hypergradient import implicit
from memmeta.linear_solve import cg
from memmeta.meta import propose

CHUNK = 8


def quadratic(accuracy: float = 1e-2) -> None:
    """Propose, then run all tasks each iteration and compare the mean of ‖∇F‖² with ε."""
    family = Family(jnp.linspace(1.0, 10.0, 20), jnp.ones(20))
    tasks, theta = family.sample(jax.random.key(0), 16), jnp.ones(20)
    found = propose(family.problem(), theta, tasks, accuracy)
    print(f"Quadratic, accuracy {accuracy}\n{found}")
    step = mm.make_meta_step(
        family.problem(),
        mm.InnerLoop(mm.inner.accelerated(), found.inner_steps),
        implicit(cg(found.cg_steps)),
        optax.sgd(found.outer_rate),
    )

    def squares(state: mm.MetaState) -> jax.Array:
        def body(state: mm.MetaState, _: None) -> tuple[mm.MetaState, jax.Array]:
            square = jnp.sum(family.gradient(state.meta_params, tasks) ** 2)
            return step.update(state, tasks)[0], square

        return jax.lax.scan(body, state, length=found.meta_steps)[1]

    mean = float(jnp.mean(jax.jit(squares)(step.init(theta))))
    print(f"Measured: mean of ‖∇F‖² over {found.meta_steps} meta-steps = {mean:.2g}\n")


def glyphs(width: int, accuracy: float) -> None:
    """Propose for the paper's method on glyphs, then run it and look at ‖∇F‖² along the way.

    Each batch is drawn in two halves, with gradients G and G': E⟨G, G'⟩ = ‖∇F‖², without the σ²/|B|
    that ‖G‖² has on top.
    """
    network, theta = features(width)
    problem = head_problem(network, ridge=0.1, learn_start=False)
    measured_on = glyph_tasks(jax.random.key(1), 8)
    found = propose(problem, theta, measured_on, accuracy)
    print(f"Glyphs, 5-way 1-shot, Conv4-{width}, accuracy {accuracy}\n{found}", flush=True)
    half = CHUNK * math.ceil(found.batch_size / (2 * CHUNK))
    step = mm.make_meta_step(
        problem,
        mm.InnerLoop(mm.inner.accelerated(), found.inner_steps),
        implicit(cg(found.cg_steps), estimate_error=False),
        optax.sgd(found.outer_rate),
        task_chunk=CHUNK,
    )

    @jax.jit
    def advance(theta: Any, halves: Any) -> tuple[Any, jax.Array]:
        state = step.init(theta)
        first, second = (step.gradient(state, tasks)[0] for tasks in halves)
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), first, second)
        rate = found.outer_rate / 2
        theta = jax.tree.map(lambda t, a, b: t - rate * (a + b), theta, first, second)
        return theta, sum(jax.tree.leaves(products), start=jnp.zeros(()))

    squares = []
    for k in range(found.meta_steps):
        keys = jax.random.split(jax.random.key(100 + k))
        theta, square = advance(theta, [glyph_tasks(key, half) for key in keys])
        squares.append(float(square))
    fit = over_seeds(np.array(squares))
    verdict = "the guarantee held" if fit.high <= accuracy else "THE GUARANTEE DID NOT HOLD"
    steps = f"{found.meta_steps} meta-steps of {2 * half} tasks"
    print(f"Measured: mean of ‖∇F‖² over {steps} = {fit}, {squares[0]:.2g} at the first: {verdict}")
    ended = propose(problem, theta, measured_on, accuracy)
    constants = f"L = {ended.smoothness:.3g}, L_F = {ended.outer_smoothness:.3g}"
    print(f"At the end: {constants}, σ² = {ended.variance:.3g}, F = {ended.loss:.3g}")


def main(arguments: list[str] | None = None) -> None:
    """Print both."""
    parser = make_parser(__doc__, "proposal")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--accuracy", type=float, default=1.0, help="on glyphs")
    options = parser.parse_args(arguments)
    with jax.enable_x64(True):
        quadratic()
    glyphs(options.width, options.accuracy)


if __name__ == "__main__":
    main()
