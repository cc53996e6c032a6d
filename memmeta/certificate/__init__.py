"""How wrong an implicit hypergradient can be: rigorous bounds, and estimates."""

from memmeta._shared.readable import readable
from memmeta.certificate._bound import Constants, deviations_from
from memmeta.certificate._certify import certify
from memmeta.certificate._estimate import estimate
from memmeta.certificate._in_theta import error_in_theta

__all__ = ["Constants", "certify", "deviations_from", "error_in_theta", "estimate"]

readable(__name__)
