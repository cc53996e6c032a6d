"""A look at what the user wrote, by shapes alone, before it is compiled for the first time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memmeta._shared import trees
from memmeta.inner import InnerLoop
from memmeta.problem import Batch, MetaParams, Problem


def first_look(problem: Problem, inner: InnerLoop, meta_params: MetaParams, tasks: Batch) -> None:
    """Trace each of a problem's functions once on shapes, and say what does not fit.

    Raises:
        ValueError: naming the function or argument, what it gave and what was expected.
    """
    require_arrays("meta_params", meta_params)
    require_arrays("tasks", tasks)
    if problem.structure.check is not None:
        problem.structure.check(tasks)
    count = trees.leading_size(tasks, "tasks")
    theta, batch = jax.tree.map(shape_of, (meta_params, tasks))
    task = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    hint = (
        f"It was given one of {count} tasks, {_described(task)}; every leaf of `tasks` needs a "
        "leading axis of tasks."
    )
    context = _traced("embed", problem.embed, theta, task, hint=hint)
    params = _traced("init", problem.init, theta)
    adapts = any(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(params))
    if inner.steps > 0 and not adapts:
        raise ValueError(
            f"init: returned {_described(params)}, expected at least one floating-point array to "
            "adapt. Write jnp.zeros(n), not jnp.zeros(n, int)."
        )
    loss = _traced("inner_loss", problem.inner_loss, params, context)
    if not _is_scalar(loss):
        raise ValueError(
            f"inner_loss: returned {_described(loss)}, expected one floating-point scalar (an aux "
            "belongs to outer_loss alone). Write jnp.mean(...) or jnp.sum(...)."
        )
    outer = _traced("outer_loss", problem.outer_loss, params, context)
    if not (isinstance(outer, tuple) and len(outer) == 2 and _is_scalar(outer[0])):
        raise ValueError(
            f"outer_loss: returned {_described(outer)}, expected (loss, aux) with a floating-point "
            "scalar and any pytree of arrays. Write return loss, {}."
        )


def require_arrays(name: str, tree: Any) -> None:
    """Refuse a tree with leaves that are no arrays, such as functions of a module.

    Raises:
        ValueError: naming the first such leaf, and how to split it off.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            where = jax.tree_util.keystr(path) or "the whole of it"
            raise ValueError(
                f"{name}: found {type(leaf).__name__} {leaf!r:.60} at {where}, expected arrays "
                "only. Split the rest off and close over it: arrays, static = "
                "eqx.partition(module, eqx.is_array) for equinox, graph, arrays = "
                "nnx.split(module) for flax nnx."
            )


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype without the sharding that an array on an explicit mesh has in its type."""
    kind = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)


def _traced(name: str, function: Callable[..., Any], *shapes: Any, hint: str = "") -> Any:
    try:
        return jax.eval_shape(function, *shapes)
    except ValueError:
        raise
    except Exception as error:
        said = f"{name}: raised {type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
        raise ValueError(f"{said}. {hint}".rstrip()) from error


def _is_scalar(found: Any) -> bool:
    is_array = isinstance(found, jax.ShapeDtypeStruct)
    return is_array and found.shape == () and bool(jnp.issubdtype(found.dtype, jnp.floating))


def _described(found: Any) -> str:
    """Shapes and dtypes of a traced output, short."""
    if isinstance(found, jax.ShapeDtypeStruct):
        return f"{found.dtype}{list(found.shape)}"
    if isinstance(found, tuple) and not hasattr(found, "_fields"):
        return f"({', '.join(map(_described, found))})"
    return f"{jax.tree.map(_described, found)}" if jax.tree.leaves(found) else repr(found)
