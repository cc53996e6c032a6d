"""How wrong an implicit hypergradient can be: rigorous bounds, and estimates."""

from memmeta.certificate._bound import (
    Constants,
    Measured,
    bound,
    certify,
    deviations_from,
    distance_bound,
    measure,
)
from memmeta.certificate._estimate import Certificate, estimate

__all__ = [
    "Certificate",
    "Constants",
    "Measured",
    "bound",
    "certify",
    "deviations_from",
    "distance_bound",
    "estimate",
    "measure",
]
