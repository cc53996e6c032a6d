"""Set-up of all tests: annotations checked, a compilation cache, several simulated devices.

With MEMMETA_TESTS=plain annotations are not checked and XLA optimises as it does by default: the
library then runs, and refuses wrong arguments, as it does for a user.
"""

import gc
import os
import pathlib
from collections.abc import Iterator
from importlib.metadata import version

from typechecker import PLAIN

FLAGS = ["--xla_force_host_platform_device_count=8"]
if not PLAIN:
    # Most of the tests' time is the compiler's, and small arrays need no optimised code.
    FLAGS.append("--xla_backend_optimization_level=0")
    if version("jaxlib").startswith("0.10."):
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # later ones do not know it, and abort
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
cache = pathlib.Path(__file__).parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))

if not PLAIN:
    from jaxtyping import install_import_hook

    install_import_hook("memmeta", "typechecker.check")

import chex
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# All programs are kept: hardly any takes half a second without optimisation, there are thousands.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Traces are millions of objects that live long: to look through them all so often is a twentieth
# of the tests' time.
gc.set_threshold(20_000, 20, 20)
jax.devices()  # made now, so that no run under test can choose their number


@pytest.fixture
def x64() -> Iterator[None]:
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def no_traces_yet() -> None:
    """Let `chex.assert_max_traces` count each test's own."""
    chex.clear_trace_counter()
