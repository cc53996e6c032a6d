r"""What each inner step sees of its task: all of it, some rows drawn, or a part of its own.

    view(context, key, step) -> context

The key is the task's own and the same in every step.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Key

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.problem import Context

View: TypeAlias = Callable[[Context, Key[Array, ""], Int32[Array, ""]], Context]
"""(context, the task's key, step) -> the context that this step's inner loss sees."""


SORTED, ROUNDS = 512, 6
"""So many rows are sorted at random; more go through so many rounds of a network."""


@named
def minibatch(size: int, of: Callable[[str], bool]) -> View:
    r"""A few rows in each step, drawn without replacement within an epoch.

    Step k takes rows $\pi_e(b \cdot \text{size} \ldots (b+1) \cdot \text{size})$ with e and b the
    quotient and the rest of k by ⌊n/size⌋, and π_e a permutation of the n rows drawn for epoch e.
    What is left over of an epoch is not used in it.

    Args:
        size: rows in each step.
        of: whether a leaf of the context is cut along its first axis, by its path such as
            "1/support_inputs"; all such leaves have the same number of rows.

    Returns:
        The view, for `InnerLoop(..., view=...)`.

    Raises:
        ValueError: `size` is no whole number above 0; (when traced) no leaf is chosen, their rows
            differ in number, or there are fewer than `size`.

    Example:
        >>> view = minibatch(2, of=lambda path: path == "rows")
        >>> context = {"rows": jnp.arange(4), "weight": jnp.ones(3)}
        >>> first, second = (view(context, jax.random.key(0), jnp.int32(k)) for k in (0, 1))
        >>> sorted([*first["rows"].tolist(), *second["rows"].tolist()]), first["weight"].shape
        ([0, 1, 2, 3], (3,))
    """
    checks.count("size", size)

    def view(context: Context, key: Key[Array, ""], step: Int32[Array, ""]) -> Context:
        rows = {leaf.shape[0] for leaf in _chosen(context, of)}
        if len(rows) != 1:
            every = jax.tree_util.tree_leaves_with_path(context)
            paths = ", ".join(f"{trees.path_name(keys)} {list(leaf.shape)}" for keys, leaf in every)
            raise ValueError(
                f"of: chooses leaves with {sorted(rows) or 'no'} rows, expected one number of "
                f"rows. The context has {paths}."
            )
        count = rows.pop()
        checks.require("size", size, size <= count, f"at most the {count} rows there are")
        epoch, batch = jnp.divmod(step, count // size)
        places = batch * size + jnp.arange(size, dtype=jnp.int32)
        drawn = _shuffled(jax.random.fold_in(key, epoch), places, count)
        return _changed(context, of, lambda leaf: leaf[drawn])

    return view


def seen_by(view: View, context: Context, key: Key[Array, ""], step: Int32[Array, ""]) -> Context:
    """What a view lets one step see.

    Raises:
        ValueError: the view's shapes depend on the step, or it returns another structure.
    """
    try:
        seen = view(context, key, step)
    except (jax.errors.ConcretizationTypeError, jax.errors.NonConcreteBooleanIndexError) as error:
        raise _depends_on_step() from error
    except (IndexError, TypeError) as error:
        if "static" not in str(error) and "Tracer" not in str(error):
            raise
        raise _depends_on_step() from error
    found, expected = (jax.tree.structure(tree) for tree in (seen, context))
    checks.require("view", found, [found] == [expected], f"a context like the given, {expected}")
    return seen


def _depends_on_step() -> ValueError:
    return ValueError(
        "view: found one whose shapes depend on the step, expected the same shapes in every step, "
        "which is a traced number. Cut rows by jax.lax.dynamic_slice_in_dim(leaf, first, size), or "
        "use memmeta.inner.minibatch."
    )


@named
def step_by_step(of: Callable[[str], bool]) -> View:
    """Data that have an axis of steps already: step k sees entry k of it.

    Args:
        of: whether a leaf of the context has such a first axis, by its path.

    Returns:
        The view. Steps beyond the end see the last entry.

    Example:
        >>> view = step_by_step(of=lambda path: path == "data")
        >>> view({"data": jnp.arange(3.0)}, jax.random.key(0), jnp.int32(2))["data"].tolist()
        2.0
    """

    def view(context: Context, key: Key[Array, ""], step: Int32[Array, ""]) -> Context:
        return _changed(
            context,
            of,
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, step, keepdims=False),
        )

    return view


def _shuffled(
    key: Key[Array, ""], places: Int32[Array, " size"], count: int
) -> Int32[Array, " size"]:
    """Entries of a random order of `count` numbers, of which only these are computed.

    A sort of all rows in each step would cost far more than a gradient on a few of them. A Feistel
    network permutes the numbers below a power of four, and is applied again to what came out at
    `count` or above, so that the rest is permuted among itself (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002). Few numbers are sorted: a network has too few orders of them.
    """
    if count <= SORTED:
        return jax.random.permutation(key, count)[places].astype(jnp.int32)
    half = jnp.uint32(((count - 1).bit_length() + 1) // 2)
    mask = (jnp.uint32(1) << half) - jnp.uint32(1)
    keys = jax.random.bits(key, (ROUNDS,), jnp.uint32)

    def permuted(x: Array) -> Array:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        joined: Array = (left << half) | right
        return joined

    def outside(x: Array) -> Array:
        beyond: Array = x >= jnp.uint32(count)
        return beyond

    def again(x: Array) -> Array:
        return jnp.where(outside(x), permuted(x), x)

    first = permuted(places.astype(jnp.uint32))
    found: Array = jax.lax.while_loop(lambda x: jnp.any(outside(x)), again, first)
    return found.astype(jnp.int32)


def _mixed(x: Array) -> Array:
    """Every bit of x on every bit of the result: the last step of MurmurHash3 (Appleby, 2011)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    mixed: Array = x ^ (x >> jnp.uint32(16))
    return mixed


def _chosen(context: Context, of: Callable[[str], bool]) -> list[Array]:
    return [
        leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(context)
        if of(trees.path_name(keys))
    ]


def _changed(
    context: Context, of: Callable[[str], bool], change: Callable[[Array], Array]
) -> Context:
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: change(leaf) if of(trees.path_name(keys)) else leaf, context
    )
