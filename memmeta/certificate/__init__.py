"""How wrong an implicit hypergradient can be: rigorous bounds, and estimates."""

from memmeta.certificate._bound import Constants, certify, deviations_from
from memmeta.certificate._estimate import estimate

__all__ = ["Constants", "certify", "deviations_from", "estimate"]
