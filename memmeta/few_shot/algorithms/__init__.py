"""The literature's methods, each a few lines: which parameters adapt, how, and which estimator."""

from collections.abc import Callable

from memmeta._shared.readable import Catalogue, readable
from memmeta.few_shot.algorithms._closed_form import protonet, r2d2
from memmeta.few_shot.algorithms._implicit import amigo, imaml, memory_reduced, stocbio
from memmeta.few_shot.algorithms._learner import Learner
from memmeta.few_shot.algorithms._steps import anil, boil, itd_bio, maml, meta_sgd
from memmeta.few_shot.algorithms._without_hessians import fomaml, pzobo, reptile

METHODS: Catalogue[Callable[..., Learner]] = Catalogue(
    {
        "memory_reduced": memory_reduced,
        "maml": maml,
        "anil": anil,
        "fomaml": fomaml,
        "reptile": reptile,
        "boil": boil,
        "imaml": imaml,
        "itd_bio": itd_bio,
        "stocbio": stocbio,
        "amigo": amigo,
        "pzobo": pzobo,
        "meta_sgd": meta_sgd,
        "r2d2": r2d2,
        "protonet": protonet,
    }
)
"""Every method by its name in the literature; the shared test runs over this list."""

__all__ = [
    "METHODS",
    "Learner",
    "amigo",
    "anil",
    "boil",
    "fomaml",
    "imaml",
    "itd_bio",
    "maml",
    "memory_reduced",
    "meta_sgd",
    "protonet",
    "pzobo",
    "r2d2",
    "reptile",
    "stocbio",
]

readable(__name__)
