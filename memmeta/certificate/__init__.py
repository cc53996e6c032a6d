"""How wrong an implicit hypergradient can be: rigorous bounds, and estimates."""

from memmeta._shared.readable import readable
from memmeta.certificate._bound import Constants, deviations_from
from memmeta.certificate._certify import certify
from memmeta.certificate._estimate import estimate
from memmeta.certificate._in_theta import error_in_theta
from memmeta.certificate._of_solve import error_of_solve

__all__ = [
    "Constants",
    "certify",
    "deviations_from",
    "error_in_theta",
    "error_of_solve",
    "estimate",
]

readable(__name__)
