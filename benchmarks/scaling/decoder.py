"""A decoder whose layers are stacked, as a bilevel problem: all of it or low-rank factors adapt.

Parameters, moments, φ, the solver's vectors and the data are sharded over the axis "model" of a
mesh: every matrix along one of its axes, data along their batch (FSDP). A layer is computed anew in
each backward pass but for what a `jax.checkpoint` policy saves. The shapes are LLaMA's; there are
no positions, which take no bytes to speak of.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import memmeta as mm

MODEL = "model"
RATE, STEPS, SOLVES, PULL = 1e-2, 3, 5, 1.0
"""Rate and steps of the inner loop, steps of conjugate gradients, weight of the proximal term."""


class Shape(NamedTuple):
    """Sizes of a decoder and of what one task brings."""

    layers: int = 16
    width: int = 64
    heads: int = 2
    hidden: int = 192
    words: int = 128
    rank: int = 0  # of φ's factors; 0: every parameter adapts
    batch: int = 8  # sequences of support, and of query
    length: int = 16
    policy: str = "nothing_saveable"  # a name in jax.checkpoint_policies

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's matrices."""
        w, h = self.width, self.hidden
        return {"qkv": (w, 3 * w), "out": (w, w), "up": (w, 2 * h), "down": (h, w)}

    @property
    def in_layer(self) -> int:
        """Numbers of a layer's matrices."""
        return sum(math.prod(shape) for shape in self.matrices.values())


def parameters(shape: Shape, key: jax.Array) -> Any:
    """θ: the decoder, and where factors adapt their start."""
    keys = iter(jax.random.split(key, 16))

    def draw(*size: int) -> jax.Array:
        return jax.random.normal(next(keys), size) * size[-2] ** -0.5

    def stack(make: Any) -> dict[str, Any]:
        return {name: make(rows, columns) for name, (rows, columns) in shape.matrices.items()}

    n, r, w = shape.layers, shape.rank, shape.width
    base = {
        "layers": {
            **stack(lambda rows, columns: draw(n, rows, columns)),
            "norms": jnp.ones((n, 2, w)),
        },
        "read": draw(shape.words, w),
        "write": draw(w, shape.words),
    }
    if not r:
        return {"base": base}
    factors = stack(
        lambda rows, columns: {"first": draw(n, rows, r), "last": jnp.zeros((n, r, columns))}
    )
    return {"base": base, "factors": factors}


def layout(theta: Any) -> Any:
    """How each array of θ is sharded: a matrix by its rows, a factor by the longer of its axes."""

    def one(path: Any, leaf: Any) -> P:
        names = [entry.key for entry in path]
        if "norms" in names:
            return P()
        longer = leaf.ndim - 1 if names[-1] in ("last", "write") else leaf.ndim - 2
        return P(*[MODEL if axis == longer else None for axis in range(leaf.ndim)])

    return jax.tree_util.tree_map_with_path(one, theta)


def tasks(shape: Shape, count: int, key: jax.Array) -> Any:
    """Random sequences: each task's own draw of words."""
    size = (2, count, shape.batch, shape.length + 1)
    support, query = jax.random.randint(key, size, 0, shape.words)
    return {"support": support, "query": query}


DATA = P("tasks", MODEL)


def by_batch(x: jax.Array) -> jax.Array:
    """Activations stay with their sequence: what travels is matrices, a layer at a time."""
    there = MODEL in jax.sharding.get_abstract_mesh().axis_names
    return jax.lax.with_sharding_constraint(x, P(MODEL)) if there else x


def logits(shape: Shape, base: Any, factors: Any, words: jax.Array) -> jax.Array:
    """[batch, length, words] of the next word."""
    policy = getattr(jax.checkpoint_policies, shape.policy)
    each = shape.width // shape.heads
    mask = jnp.tril(jnp.ones((words.shape[1], words.shape[1]), bool))

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def layer(x: jax.Array, stacked: Any) -> tuple[jax.Array, None]:
        x, (matrices, low) = by_batch(x), stacked

        def product(name: str, x: jax.Array) -> jax.Array:
            plain = by_batch(x @ matrices[name])
            if low is None:
                return plain
            return plain + by_batch(by_batch(x @ low[name]["first"]) @ low[name]["last"])

        mixed = product("qkv", norm(x, matrices["norms"][0]))
        q, k, v = jnp.split(mixed.reshape(*x.shape[:2], 3 * shape.heads, each), 3, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * each**-0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
        seen = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + product("out", seen)
        gate, up = jnp.split(product("up", norm(x, matrices["norms"][1])), 2, axis=-1)
        return x + product("down", jax.nn.silu(gate) * up), None

    # `prevent_cse` is for code outside of loops
    kept = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    x, _ = jax.lax.scan(kept, base["read"][words], (base["layers"], factors))
    return by_batch(norm(x, jnp.ones(shape.width)) @ base["write"])


def loss(shape: Shape, base: Any, factors: Any, words: jax.Array) -> jax.Array:
    """Mean cross-entropy of each next word."""
    found = logits(shape, base, factors, words[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, words[:, 1:]))


def problem(shape: Shape) -> mm.Problem:
    """φ, all parameters or factors, near their start in θ."""

    def parts(theta: Any, phi: Any) -> tuple[Any, Any]:
        return (theta["base"], phi) if shape.rank else (phi, None)

    def start(theta: Any) -> Any:
        return theta["factors" if shape.rank else "base"]

    def inner_loss(phi: Any, context: Any) -> jax.Array:
        theta, task = context
        apart = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), phi, start(theta))
        pull = 0.5 * PULL * sum(jax.tree.leaves(apart))
        return loss(shape, *parts(theta, phi), task["support"]) + pull

    def outer_loss(phi: Any, context: Any) -> tuple[jax.Array, dict]:
        theta, task = context
        return loss(shape, *parts(theta, phi), task["query"]), {}

    return mm.Problem(lambda theta, task: (theta, task), inner_loss, outer_loss, start)


def meta_step(shape: Shape, mesh: Mesh | None, rate: float = 1e-4) -> mm.MetaStep:
    """One task at a time on each device of the tasks' axis; Adam outside."""
    return mm.make_meta_step(
        problem(shape),
        mm.InnerLoop(optax.sgd(RATE), steps=STEPS),
        mm.hypergradient.implicit(mm.linear_solve.cg(SOLVES)),
        optax.adam(rate),
        task_chunk=1,
        mesh=mesh,
    )


def sharded(mesh: Mesh, theta: Any, batch: Any) -> tuple[Any, Any]:
    """θ and tasks, or their shapes, on a mesh."""

    def put(leaf: Any, spec: P) -> Any:
        sharding = NamedSharding(mesh, spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, theta, layout(theta)), jax.tree.map(partial(put, spec=DATA), batch)
