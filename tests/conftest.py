"""Set-up of all tests: annotations checked, a compilation cache, several simulated devices."""

import os
import pathlib
from importlib.metadata import version

# Most of the tests' time is the compiler's, and small arrays need no optimised code.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # later ones do not know it, and abort
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
cache = pathlib.Path(__file__).parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))

from jaxtyping import install_import_hook

install_import_hook("memmeta", "typechecker.check")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.devices()  # made now, so that no run under test can choose their number


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield
