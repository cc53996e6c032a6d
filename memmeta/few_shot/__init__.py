r"""Few-shot learning as a bilevel problem: linear heads, networks, and the literature's methods.

With X̃ = [X, 1] the features and a column of ones, and Φ = [kernel; bias], a linear head has

    g(Φ) = ℓ(X̃ Φ) + ridge/2 · ‖Φ‖²,      f(Φ) = ℓ_query(X̃_query Φ)

where ℓ is the mean cross-entropy (softmax) or half the mean squared error (squared).
"""

from memmeta.few_shot._closed_form import ridge_solution
from memmeta.few_shot._curvature import (
    largest_eigenvalue_bound,
    smoothness_bound,
    squared_smoothness_bound,
)
from memmeta.few_shot._head import HeadContext
from memmeta.few_shot._losses import (
    softmax_inner_loss,
    softmax_outer_loss,
    softmax_problem,
    squared_inner_loss,
    squared_outer_loss,
    squared_problem,
)
from memmeta.few_shot._networks import Adapts, Statistics, head_problem, network_problem

__all__ = [
    "Adapts",
    "HeadContext",
    "Statistics",
    "head_problem",
    "largest_eigenvalue_bound",
    "network_problem",
    "ridge_solution",
    "smoothness_bound",
    "softmax_inner_loss",
    "softmax_outer_loss",
    "softmax_problem",
    "squared_inner_loss",
    "squared_outer_loss",
    "squared_problem",
    "squared_smoothness_bound",
]
