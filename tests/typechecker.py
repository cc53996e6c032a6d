"""The run-time check of annotations, and whether the tests make it."""

import os

from beartype import BeartypeConf, beartype

PLAIN = os.environ.get("MEMMETA_TESTS") == "plain"
"""Whether the library runs as it does for a user: annotations unchecked, code optimised."""

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Here an int stands for a float, as PEP 484 says."""
