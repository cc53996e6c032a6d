r"""Few-shot learning as a bilevel problem: linear heads, networks, and the literature's methods.

With X̃ = [X, 1] the features and a column of ones, and Φ = [kernel; bias], a linear head has

    g(Φ) = ℓ(X̃ Φ) + ridge/2 · ‖Φ‖²,      f(Φ) = ℓ_query(X̃_query Φ)

where ℓ is the mean cross-entropy (softmax) or half the mean squared error (squared).
"""

from memmeta._shared.readable import readable
from memmeta.few_shot._closed_form import ridge_solution
from memmeta.few_shot._examples import Loss
from memmeta.few_shot._head import HeadContext
from memmeta.few_shot._losses import softmax_problem, squared_problem
from memmeta.few_shot._networks import Statistics, head_problem, network_problem

__all__ = [
    "HeadContext",
    "Loss",
    "Statistics",
    "head_problem",
    "network_problem",
    "ridge_solution",
    "softmax_problem",
    "squared_problem",
]

readable(__name__)
