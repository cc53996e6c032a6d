"""Stochastic and warm bilevel algorithms by their names in the literature.

Each is a `memmeta.meta.WarmStart`: a loop that lives across meta-steps, a rule for the
hypergradient, and an outer optimiser.
"""

from memmeta._shared.readable import readable
from memmeta.recipes._amigo import amigo
from memmeta.recipes._bome import bome
from memmeta.recipes._f2sa import f2sa
from memmeta.recipes._saba import saba
from memmeta.recipes._soba import ma_soba, soba

__all__ = ["amigo", "bome", "f2sa", "ma_soba", "saba", "soba"]

readable(__name__)
