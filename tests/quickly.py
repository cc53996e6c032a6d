"""Compilation for tests: it is most of what they do, and small arrays need no optimised code."""

import functools

import jax

FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

quick = functools.partial(jax.jit, compiler_options=FAST)
"""`jax.jit` in half the time and less."""
