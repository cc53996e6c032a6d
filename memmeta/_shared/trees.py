"""Internal: pytrees split and merged, their norm, and which outputs depend on which inputs."""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf can be differentiated: floating point or complex, no integer, no PRNG key."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def split(tree: PyTree, chosen: PyTree[bool]) -> tuple[PyTree, PyTree]:
    """Split a tree into (chosen, others), each with `None` where the other has its leaf.

    Example:
        >>> split({"a": 1.0, "b": 2}, {"a": True, "b": False})
        ({'a': 1.0, 'b': None}, {'a': None, 'b': 2})
    """
    kept = jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, chosen)
    rest = jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, chosen)
    return kept, rest


def merge(kept: PyTree, rest: PyTree) -> PyTree:
    """The inverse of `split`.

    Example:
        >>> merge({"a": 1.0, "b": None}, {"a": None, "b": 2})
        {'a': 1.0, 'b': 2}
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a, kept, rest, is_leaf=lambda leaf: leaf is None
    )


def split_inexact(tree: PyTree) -> tuple[PyTree, PyTree]:
    """`split` into the leaves that can be differentiated and the others.

    Example:
        >>> split_inexact((1.0, 2))
        ((1.0, None), (None, 2))
    """
    return split(tree, jax.tree.map(is_inexact, tree))


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point entry of a tree is finite.

    Example:
        >>> bool(all_finite({"a": jnp.ones(2), "n": 3}))
        True
    """
    found = [
        jnp.all(jnp.isfinite(each))
        for each in _few(x for x in jax.tree.leaves(tree) if is_inexact(x))
    ]
    if not found:
        return jnp.ones((), bool)
    # The barrier keeps XLA (jax 0.10.2) from making the chain of all results anew in every kernel
    # that uses its end.
    finite: Array = jnp.all(jax.lax.optimization_barrier(jnp.stack(found)))
    return finite


SMALL = 4096
"""Numbers; leaves of no more are looked at together."""


def _few(leaves: Iterable[Any]) -> list[Array]:
    """Some arrays as fewer: the small ones of one dtype as one vector, empty ones left out.

    Each array that is reduced takes kernels of its own, and their number is what compiling a
    program of many small arrays costs.
    """
    arrays = [leaf for leaf in map(jnp.asarray, leaves) if leaf.size]
    large = [leaf for leaf in arrays if leaf.size > SMALL]
    small: dict[Any, list[Array]] = {}
    for leaf in arrays:
        if leaf.size <= SMALL:
            small.setdefault(leaf.dtype, []).append(leaf)
    return large + [
        jnp.concatenate([jnp.ravel(leaf) for leaf in each]) if len(each) > 1 else each[0]
        for each in small.values()
    ]


def where(condition: Bool[Array, ""], yes: PyTree, no: PyTree) -> PyTree:
    """`yes` or `no`, whole trees.

    Example:
        >>> where(jnp.bool_(False), {"a": jnp.ones(2)}, {"a": jnp.zeros(2)})["a"].tolist()
        [0.0, 0.0]
    """
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of a tree, without overflow or underflow of the squares.

    Sums are taken in float32 at least, so bfloat16 trees lose nothing more. The derivative at zero,
    where a root has none, is zero.

    Example:
        >>> round(float(norm({"a": jnp.array([3e30]), "b": jnp.array([4e30])})) / 1e30, 3)
        5.0
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    arrays = _few(leaf.astype(accumulator(leaf.dtype)) for leaf in leaves)
    return _norm(arrays) if arrays else jnp.zeros((), jnp.float32)


@jax.custom_jvp
def _norm(arrays: list[Array]) -> Float[Array, ""]:
    """Small arrays in one pass over their numbers; large ones in two, which keep less at once."""
    real = jnp.finfo(widest(each.dtype for each in arrays))
    small = all(each.size <= SMALL for each in arrays)
    return _in_one_pass(arrays, real) if small else _in_two_passes(arrays, real)


def _in_one_pass(arrays: list[Array], real: Any) -> Float[Array, ""]:
    """Of the sums of squares of the numbers as they are, made small and made large: the one to use.

    XLA's CPU compiler (jax 0.10.2) stores what it sums, here three times the numbers.
    """
    scales = jnp.asarray(np.ldexp(1.0, np.array([0, -5, 5]) * (real.maxexp // 8)), real.dtype)

    def squares(each: Array) -> Float[Array, " scales"]:
        wide = scales.astype(each.dtype).reshape(-1, *[1] * each.ndim)
        square = _square(jnp.expand_dims(each, 0) * wide)
        return jnp.sum(square, axis=range(1, square.ndim)).astype(real.dtype)

    as_is, small, large = jnp.sqrt(reduce(jnp.add, map(squares, arrays))) / scales
    known = jnp.where(as_is < jnp.inf, as_is, small)
    return jnp.where(as_is < np.ldexp(1.0, -real.maxexp // 4), large, known)


def _in_two_passes(arrays: list[Array], real: Any) -> Float[Array, ""]:
    """The largest magnitude, then the sum of squares of the numbers over it."""
    found = [jnp.max(_magnitude(each)).astype(real.dtype) for each in arrays]
    greatest = reduce(jnp.maximum, found)
    scale = jnp.where(greatest > 0, greatest, 1)
    squares = [jnp.sum(_square(x / scale.astype(x.dtype))).astype(real.dtype) for x in arrays]
    return scale * jnp.sqrt(reduce(jnp.add, squares))


def _square(array: Array) -> Array:
    return jnp.real(array * jnp.conj(array)) if jnp.iscomplexobj(array) else array**2


def _magnitude(array: Array) -> Array:
    if jnp.iscomplexobj(array):  # whose absolute value can overflow
        return jnp.maximum(jnp.abs(array.real), jnp.abs(array.imag))
    return jnp.abs(array)


@_norm.defjvp
def _norm_and_change(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """d‖a‖ = aᵀda / ‖a‖."""
    (arrays,), (changes,) = primals, tangents
    found = _norm(arrays)
    length = jnp.where(found > 0, found, 1)
    along = [
        dot(each / length.astype(each.dtype), change).real.astype(found.dtype)
        for each, change in zip(arrays, changes, strict=True)
    ]
    return found, reduce(jnp.add, along)


def dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """The inner product aᵀb of two trees of one structure, aᴴb of complex ones.

    All axes are contracted as they are: an array that is sharded over devices cannot be laid out as
    a vector (as `jnp.vdot` does) without gathering it whole on each of them. Products are exact to
    the dtype on every device: by default a GPU or TPU may round float32 factors to fewer bits.

    Example:
        >>> float(dot({"a": jnp.ones((2, 3))}, {"a": jnp.full((2, 3), 2.0)}))
        12.0
    """

    def one(x: Array, y: Array) -> Array:
        x, y = jnp.asarray(x), jnp.asarray(y)
        axes = tuple(range(x.ndim))
        contracted = ((axes, axes), ((), ()))
        return jax.lax.dot_general(jnp.conj(x), y, contracted, jax.lax.Precision.HIGHEST)

    products: list[Array] = jax.tree.leaves(jax.tree.map(one, a, b))
    products = products or [jnp.zeros((), jnp.float32)]
    return sum(products[1:], products[0])


def path_name(keys: tuple[Any, ...]) -> str:
    """The path of a leaf as users write it.

    Example:
        >>> [path_name(keys) for keys, _ in jax.tree_util.tree_leaves_with_path({"a": [1, 2]})]
        ['a/0', 'a/1']
    """
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def accumulator(dtype: Any) -> Any:
    """The dtype sums are taken in: float32 for the half-precision types, else the dtype itself.

    Example:
        >>> accumulator(jnp.bfloat16).__name__, jnp.dtype(accumulator(jnp.float64)).name
        ('float32', 'float64')
    """
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def widest(dtypes: Iterable[Any]) -> Any:
    """The floating-point dtype of most bits; float32 of none."""
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits, default=jnp.float32)


def reach(function: Callable[[PyTree], PyTree], argument: PyTree) -> list[PyTree[bool]]:
    """For each inexact input leaf, which output leaves have a derivative, zero or not, by it.

    The answer is structural: it is read off the derivative, traced once, and nothing is computed.
    Integer outputs, and outputs that depend on a leaf only through `stop_gradient`, do not depend.

    Args:
        function: a pure function of one pytree.
        argument: where to trace it (arrays or `jax.ShapeDtypeStruct`).

    Returns:
        For each inexact leaf of the argument: the tree of outputs with a Python bool at each leaf.

    Example:
        >>> reach(lambda x: {"a": 2 * x[0], "b": x[0] * x[1]}, (1.0, 2.0))
        [{'a': True, 'b': True}, {'a': False, 'b': True}]
    """
    floats, others = split_inexact(argument)

    def derivative(floats: PyTree, tangents: PyTree) -> tuple[PyTree, PyTree]:
        outputs, derivatives = jax.jvp(lambda x: function(merge(x, others)), (floats,), (tangents,))
        # float0 tangents of integer outputs cannot leave a traced function
        return outputs, jax.tree.map(
            lambda d: None if d.dtype == jax.dtypes.float0 else d, derivatives
        )

    def value(floats: PyTree, _: PyTree) -> tuple[PyTree, PyTree]:
        outputs = function(merge(floats, others))
        return outputs, split_inexact(outputs)[0]

    leaves = len(jax.tree.leaves(floats))
    try:
        closed, (outputs, _) = jax.make_jaxpr(derivative, return_shape=True)(floats, floats)
        first = leaves
    except TypeError as error:
        # A `jax.custom_vjp` has no forward derivative: follow the values themselves instead.
        if "forward-mode" not in str(error):
            raise
        closed, (outputs, _) = jax.make_jaxpr(value, return_shape=True)(floats, floats)
        first = 0
    flags = jax.tree.map(lambda shape: jnp.issubdtype(shape.dtype, jnp.inexact), outputs)
    skipped = len(jax.tree.leaves(outputs))

    def outputs_of(index: int) -> PyTree[bool]:
        marks = iter(_reached(closed, [i == first + index for i in range(2 * leaves)])[skipped:])
        return jax.tree.map(lambda inexact: next(marks) if inexact else False, flags)

    return [outputs_of(index) for index in range(leaves)]


def _reached(closed: Any, marked: Iterable[bool]) -> list[bool]:
    """Follow the marked inputs of a traced function through it to its outputs."""
    jaxpr = closed.jaxpr
    tainted = {variable for variable, mark in zip(jaxpr.invars, marked, strict=True) if mark}

    def is_tainted(atom: Any) -> bool:
        is_literal = hasattr(atom, "val")
        return not is_literal and atom in tainted

    for equation in jaxpr.eqns:
        outputs = _through(equation, [is_tainted(atom) for atom in equation.invars])
        tainted.update(v for v, mark in zip(equation.outvars, outputs, strict=True) if mark)
    return [is_tainted(atom) for atom in jaxpr.outvars]


def _through(equation: Any, inputs: list[bool]) -> list[bool]:
    """From the marks of an equation's inputs to those of its outputs."""
    name, params = equation.primitive.name, equation.params
    if name in ("pjit", "jit") and hasattr(params["jaxpr"], "consts"):
        return _reached(params["jaxpr"], inputs)
    if name == "scan":
        return _looped(params["jaxpr"], inputs, *_kinds_of(params))
    if name == "while":
        skipped, constants = params["cond_nconsts"], params["body_nconsts"]
        count = len(inputs) - skipped - constants
        outputs = _looped(params["body_jaxpr"], inputs[skipped:], constants, count)
        ended_by = _reached(params["cond_jaxpr"], inputs[:skipped] + outputs)
        return [mark or any(ended_by) for mark in outputs]
    return [any(inputs)] * len(equation.outvars)


def _kinds_of(scan: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried."""
    if "ft_in" not in scan:
        return scan["num_consts"], scan["num_carry"]
    constants, carry, _ = scan["ft_in"].unpack()  # the form differs between versions of JAX
    return len(list(constants)), len(list(carry))


def _looped(body: Any, inputs: list[bool], constants: int, carried: int) -> list[bool]:
    """The marks of a loop's outputs: those of its carry grow until they stay as they are."""
    carry = inputs[constants : constants + carried]
    while True:
        outputs = _reached(body, inputs[:constants] + carry + inputs[constants + carried :])
        following = [a or b for a, b in zip(carry, outputs[:carried], strict=True)]
        if following == carry:
            return carry + outputs[carried:]
        carry = following


def leading_size(tree: PyTree, name: str) -> int:
    """The size of the leading axis shared by all leaves of a tree, called `name` in errors.

    Raises:
        ValueError: there is no leaf, a leaf is a scalar, or the sizes differ.

    Example:
        >>> leading_size({"x": np.ones((4, 2)), "y": np.ones(4)}, "tasks")
        4
    """
    shapes = {
        jax.tree_util.keystr(path): np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"{name}: every leaf needs the same leading axis (one entry per task), found shapes "
            f"{shapes or 'of no leaf at all'}. Stack the tasks with "
            "jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)."
        )
    return int(sizes.pop()[0])


def ravel(tree: PyTree) -> tuple[Float[Array, " size"], Callable[[Array], PyTree]]:
    """A tree of floating-point arrays as one vector, in float32 at least, and the way back.

    Example:
        >>> vector, unravel = ravel({"a": jnp.ones(2), "b": jnp.zeros(1)})
        >>> vector.tolist(), unravel(vector)["a"].tolist()
        ([1.0, 1.0, 0.0], [1.0, 1.0])
    """
    leaves, structure = jax.tree.flatten(tree)
    dtype = widest(accumulator(leaf.dtype) for leaf in leaves)
    ends = np.cumsum([leaf.size for leaf in leaves])
    vector = jnp.concatenate(
        [jnp.ravel(leaf).astype(dtype) for leaf in leaves] or [jnp.zeros(0, dtype)]
    )

    def unravel(vector: Array) -> PyTree:
        parts = jnp.split(vector, ends[:-1]) if leaves else []
        return jax.tree.unflatten(
            structure,
            [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)],
        )

    return vector, unravel


def hoisted(
    function: Callable[..., PyTree], *arguments: PyTree
) -> tuple[Callable[..., PyTree], list[Array]]:
    """A function with everything it closes over as an argument, as custom derivatives need it.

    Returns:
        pure(values, *arguments), traced at the arguments, and the values it was closed over.

    Example:
        >>> pure, values = hoisted(lambda x: x + 1, jnp.ones(2))
        >>> pure(values, jnp.zeros(2)).tolist()
        [1.0, 1.0]
    """
    # Imported here: jax.extend (jax 0.10.2) brings pallas along, and memmeta would load for longer.
    from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    structure = jax.tree.structure(shapes)

    def pure(values: list[Array], *arguments: PyTree) -> PyTree:
        evaluate = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, values))
        return jax.tree.unflatten(structure, evaluate(*jax.tree.leaves(arguments)))

    return pure, closed.consts
