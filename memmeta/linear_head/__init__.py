r"""The linear head: its context, losses, curvature bound and closed form.

With X̃ = [X, 1] the features and a column of ones, and Φ = [kernel; bias]:

    g(Φ) = ℓ(X̃ Φ) + ridge/2 · ‖Φ‖²,      f(Φ) = ℓ_query(X̃_query Φ)

where ℓ is the mean cross-entropy (softmax) or half the mean squared error (squared).
"""

from memmeta.linear_head.closed_form import ridge_solution
from memmeta.linear_head.curvature import (
    largest_eigenvalue_bound,
    smoothness_bound,
    squared_norm_bound,
    squared_smoothness_bound,
)
from memmeta.linear_head.examples import (
    accuracy,
    as_values,
    cross_entropies,
    judged,
    present,
    shares,
    squared_errors,
    weighted_mean,
)
from memmeta.linear_head.head import (
    HeadContext,
    HeadParams,
    LinearHead,
    augmented,
    stacked,
    unstacked,
)
from memmeta.linear_head.losses import (
    softmax_inner_loss,
    softmax_outer_loss,
    softmax_problem,
    squared_inner_loss,
    squared_outer_loss,
    squared_problem,
)

__all__ = [
    "HeadContext",
    "HeadParams",
    "LinearHead",
    "accuracy",
    "as_values",
    "augmented",
    "cross_entropies",
    "judged",
    "largest_eigenvalue_bound",
    "present",
    "ridge_solution",
    "shares",
    "smoothness_bound",
    "softmax_inner_loss",
    "softmax_outer_loss",
    "softmax_problem",
    "squared_errors",
    "squared_inner_loss",
    "squared_norm_bound",
    "squared_outer_loss",
    "squared_problem",
    "squared_smoothness_bound",
    "stacked",
    "unstacked",
    "weighted_mean",
]
