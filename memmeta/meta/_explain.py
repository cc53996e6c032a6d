"""A meta-step's metrics in one sentence, for a person."""

import numpy as np

from memmeta.linear_solve._status import SENTENCES, Status
from memmeta.meta._metrics import KINDS, LEFT, Metrics

CAUSES = {
    "inputs": "data are not finite (look at the tasks)",
    "inner_loop": "inner loop left the finite numbers (a smaller rate, or mm.inner.accelerated())",
    "outer_loss": (
        "outer loss is not finite (no support or no query example, a label that no output stands "
        "for, or outputs that overflow)"
    ),
    "hypergradient": (
        "hypergradient is not finite (a derivative at a kink such as sqrt(0), or an overflow: a "
        "ridge, a proximal term, float32)"
    ),
}
DOUBTS = {
    "diverging": (
        "inner loop(s) diverge, or their step is no contraction: take a smaller rate, or "
        "mm.inner.accelerated()"
    ),
    "unconverged": (
        f"inner loop(s) end with more than {LEFT:.0%} of their first slope, where an implicit rule "
        "needs a minimiser of inner_loss: more inner steps, or no constraint and no weight decay "
        "inside the inner optimiser (fixed_point() differentiates these)"
    ),
    "unsolved": (
        f"linear solve(s) leave more than {LEFT:.0%} of the system: more solver steps, a ridge, "
        "damping, or a (positive) preconditioner"
    ),
    "unsound": "linear solve(s) say that their answer should not be used",
    "indefinite": (
        "inner Hessian(s) have a direction without positive curvature: a ridge or a proximal term, "
        "or unrolled()"
    ),
}

UNKNOWN = 'the reasons were not asked for (report="none")'


def explain(metrics: Metrics) -> str:
    """Say in one sentence how a meta-step went, and what to change.

    Args:
        metrics: of one meta-step, or averaged over several; outside `jax.jit`.

    Returns:
        The sentence: which tasks were left out and why, whether inner loops and linear solves were
        long enough, whether the update was refused; or that all went well.

    Example:
        >>> import jax.numpy as jnp, optax, memmeta as mm
        >>> problem = mm.Problem(
        ...     embed=lambda theta, target: (theta, target),
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c[0]) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum((phi - c[1]) ** 2), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> step = mm.make_meta_step(
        ...     problem, mm.InnerLoop(), mm.hypergradient.implicit(), optax.sgd(0.1)
        ... )
        >>> _, metrics = step(step.init(jnp.zeros(2)), jnp.array([[1.0, 2.0], [3.0, jnp.nan]]))
        >>> explain(metrics)
        '1 of 2 tasks left out: 1 whose data are not finite (look at the tasks).'
    """
    used = int(metrics.used)
    counts = _known(metrics)
    found, masked = [], counts["masked"]
    if masked:
        causes = [
            f"{counts[name]} whose {said}" for name, said in CAUSES.items() if counts.get(name)
        ]
        found.append(f"{masked} of {used + masked} tasks left out: {'; '.join(causes) or UNKNOWN}")
    found += [
        f"{counts[name]} of {used} {said}" for name, said in DOUBTS.items() if counts.get(name)
    ]
    found += _statuses(metrics)
    if counts["refused"]:
        found.append(
            f"{counts['refused']} update(s) refused: the meta-gradient is far larger than usual, "
            "or what was to be stored is not finite (a smaller outer rate, or another dtype)"
        )
    if counts.get("reset"):
        found.append(
            f"{counts['reset']} member(s) set back to their start: what is kept of them, or their "
            "outer loss, was not finite (a smaller inner rate)"
        )
    if not used:
        found.append("no task was usable, so nothing was learned")
    if not found and len(counts) < len(KINDS):
        return f'All {used} tasks are finite; no more was looked at (report="none").'
    return ". ".join(found) + "." if found else f"All {used} tasks went well."


def _statuses(metrics: Metrics) -> list[str]:
    """What the linear solvers of single tasks say, each sentence once."""
    if metrics.tasks is None or metrics.tasks.report.linear_status is None:
        return []
    met = np.unique(
        np.asarray(metrics.tasks.report.linear_status)[np.asarray(metrics.tasks.usable)]
    )
    return [SENTENCES[Status(int(status))].rstrip(".") for status in met if status > 0]


def in_trouble(metrics: Metrics) -> bool:
    """Whether `explain` has anything to say."""
    return any(_known(metrics).values()) or not int(metrics.used)


def _known(metrics: Metrics) -> dict[str, int]:
    """The counts as numbers, without those that were not asked for."""
    return dict(zip(metrics.counts.names, np.asarray(metrics.counts.numbers).tolist(), strict=True))
