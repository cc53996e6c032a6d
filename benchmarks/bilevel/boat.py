"""BOAT, a library on PyTorch: warm starts by its loop of gradient steps and two of its rules.

    pip install 'memmeta[peers]' && pip install --no-deps boat-torch

(It asks for a NumPy before 2, which JAX does not take, and runs with the newer one.)
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bilevel.by_hand import Rates
from benchmarks.bilevel.problems import Example
from benchmarks.bilevel.recipes import STEPS
from benchmarks.bilevel.runs import Run, samples_of

RULES = {"implicit, CG, a block": "CG", "unrolled, a block": "RAD"}
"""Ours -> theirs, after its gradient steps "NGD"."""
COSTS = {"CG": 2 * STEPS + 2, "RAD": 2 * STEPS + 1}
"""Gradients and products of a meta-step, without what its log of losses computes."""


class Vector(nn.Module):
    """θ or φ as a module, as BOAT wants them."""

    def __init__(self, start: Any) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(np.asarray(start)))

    def forward(self) -> Tensor:
        return self.value


def quadratic(feed: dict[str, Any], upper: Vector, lower: Vector, **given: Any) -> Tensor:
    """The loss of `benchmarks.bilevel.problems.quadratic`, for both levels."""
    theta, phi, (a, h, u, w, b, d) = upper(), lower(**given), feed["rows"]
    squares = 0.5 * (a @ phi) ** 2 + 0.5 * (h @ theta) ** 2
    return (squares + (u @ theta) * (w @ phi) + b @ phi + d @ theta).mean()


def logistic(feed: dict[str, Any], upper: Vector, lower: Vector, **given: Any) -> Tensor:
    """The loss of `benchmarks.bilevel.problems.logistic` without the ridge."""
    inputs, labels = feed["rows"]
    return F.softplus(-labels * (inputs @ lower(**given))).mean()


def ridged_logistic(feed: dict[str, Any], upper: Vector, lower: Vector, **given: Any) -> Tensor:
    """And with it."""
    ridge = 0.5 * (upper().exp() * lower(**given) ** 2).sum()
    return logistic(feed, upper, lower, **given) + ridge


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "quadratic": (quadratic, quadratic),
    "logistic": (ridged_logistic, logistic),
}
"""g and f."""


def boat_run(rule: str, problem: str, example: Example, rates: Rates, rows: int) -> Run:
    """A rule of BOAT on a problem; each meta-step sees one block, drawn with replacement."""
    boat: Any = importlib.import_module("boat_torch")
    data = [[torch.tensor(np.asarray(leaf)) for leaf in part] for part in example.data]
    blocks = samples_of(example) // rows
    inner, outer = ({"function": f"{__name__}.{loss.__name__}"} for loss in LOSSES[problem])

    def start() -> tuple[Any, Vector, np.random.Generator]:
        theta, phi = Vector(example.theta), Vector(example.problem.init(example.theta))
        settings = {
            "gm_op": ["NGD"],
            "na_op": [rule],
            "lower_level_model": phi,
            "upper_level_model": theta,
            "lower_level_var": list(phi.parameters()),
            "upper_level_var": list(theta.parameters()),
            "lower_level_opt": torch.optim.SGD(phi.parameters(), lr=rates.inner),
            "upper_level_opt": torch.optim.SGD(theta.parameters(), lr=rates.outer),
            "lower_iters": STEPS,
            "copy_last_param": True,  # the next meta-step goes on with φ
            "CG": {"k": STEPS, "tolerance": 1e-10},
            "loss_log_path": os.devnull,
        }
        losses = {"lower_level_loss": inner, "upper_level_loss": outer}
        solver = boat.Problem(UNUSED | settings, losses)
        solver.build_ll_solver()
        solver.build_ul_solver()
        return solver, theta, np.random.default_rng(0)

    def advance(state: Any, steps: int) -> Any:
        solver, _, draws = state
        for _ in range(steps):
            feeds = []
            for part in data:
                first = rows * int(draws.integers(blocks))
                feeds.append({"rows": [leaf[first : first + rows] for leaf in part]})
            solver.run_iter(*feeds, current_iter=0)
            solver.loss_history.clear()  # all of it is written to the log in each step
        return state

    return Run(COSTS[rule], start, advance, theta=lambda state: state[1].value.detach().numpy())


UNUSED: dict[str, Any] = {
    "fo_op": None,
    "device": "cpu",
    "accumulate_grad": False,
    "return_grad": False,
    "fo_ol_batch_input": False,
    "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
    "RGT": {"truncate_iter": 0},
}
"""What BOAT reads in any case."""
