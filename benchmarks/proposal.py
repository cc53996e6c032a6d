"""Settings proposed from measured constants, with the guarantee they rest on.

    python -m benchmarks.proposal [--width W]

On the quadratic, where the promise is then checked, and on glyphs with a random Conv4.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

import memmeta as mm
from benchmarks.problems_quadratic import Family
from benchmarks.ridge import glyph_tasks
from memmeta.few_shot import head_problem
from memmeta.hypergradient import implicit
from memmeta.linear_solve import cg
from memmeta.rates import propose


def quadratic(accuracy: float = 1e-2) -> None:
    """Propose, then run all tasks each iteration and compare the mean of ‖∇F‖² with ε."""
    family = Family(jnp.linspace(1.0, 10.0, 20), jnp.ones(20))
    tasks, theta = family.sample(jax.random.key(0), 16), jnp.ones(20)
    found = propose(family.problem(), theta, tasks, accuracy)
    print(f"Quadratic, accuracy {accuracy}\n{found}")
    step = mm.make_meta_step(
        family.problem(),
        mm.InnerLoop(mm.accelerated(), found.inner_steps),
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


def glyphs(width: int, accuracy: float = 1e-1) -> None:
    """Propose for the paper's method on glyphs."""
    network = mm.models.conv4(ways=5, width=width)
    theta = {"body": network.init(jax.random.key(0))["body"]}
    problem = head_problem(network, ridge=0.1, learn_start=False)
    found = propose(problem, theta, glyph_tasks(jax.random.key(1), 8), accuracy)
    print(f"Glyphs, 5-way 1-shot, Conv4-{width}, accuracy {accuracy}\n{found}")


def main(arguments: list[str] | None = None) -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description="Settings proposed from measured constants.")
    parser.add_argument("--width", type=int, default=8)
    options = parser.parse_args(arguments)
    with jax.enable_x64(True):
        quadratic()
    glyphs(options.width)


if __name__ == "__main__":
    main()
