"""A stride-1 SAME convolution that is fast on a CPU too, differentiable any number of times.

A convolution is linear in the images and in the kernel, and so is the kernel's gradient in the
images and the cotangents. The derivatives of each are the two again:

    y = conv(x, K):     dx = conv(dy, K'),   dK = kernel_gradient(x, dy)
    G = kernel_gradient(x, g):   dx = conv(g, dG'),   dg = conv(x, dG)

with K' the kernel rotated by half a turn, channels and filters exchanged. They are therefore two
JAX primitives with these rules (forward and reverse mode, of any order), which each platform
computes in a form of its own, see `_convolution_forms`. Nothing but x and K is stored for the
backward pass.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from memmeta.models import _convolution_forms as forms

# Both work on arrays with a leading axis of tasks, as described in `_convolution_forms`.
convolution_p = Primitive("memmeta_convolution")
kernel_gradient_p = Primitive("memmeta_kernel_gradient")


def conv(
    images: Float[Array, "examples height width channels"],
    kernel: Float[Array, "rows columns channels filters"],
) -> Float[Array, "examples height width filters"]:
    """Convolve with stride 1 and SAME padding, in the form that suits the platform.

    y[n, h, w, f] = sum_{r, s, c} x[n, h + r - R // 2, w + s - S // 2, c] K[r, s, c, f]

    Args:
        images: x, any floating dtype.
        kernel: K, of odd height R and width S, of the same dtype.

    Returns:
        y, of the same dtype. Differentiable any number of times in both modes. Under `vmap` over
        tasks a shared kernel's gradient is one sum over tasks, examples and positions; kernels
        per task work as well.

    Raises:
        ValueError: if the kernel's height or width is even.

    Example:
        >>> import jax.numpy as jnp
        >>> from memmeta.models._convolution import conv
        >>> conv(jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 8))).shape
        (2, 5, 5, 8)
        >>> conv(jnp.ones((1, 4, 4, 1)), jnp.ones((2, 3, 1, 1)))
        Traceback (most recent call last):
        ValueError: kernel: height and width must be odd, found 2x3; pad the kernel with a row or \
column of zeros
    """
    rows, columns = kernel.shape[:2]
    if rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(
            f"kernel: height and width must be odd, found {rows}x{columns}; "
            "pad the kernel with a row or column of zeros"
        )
    if (rows, columns) == (1, 1):
        return images @ kernel[0, 0]
    images, kernel = _vary_over_the_same_axes(images, kernel)
    result: Array = convolution_p.bind(images[None], kernel[None])
    return result[0]


def _vary_over_the_same_axes(*arrays: Array) -> list[Array]:
    """Inside `shard_map`, mark arrays that are the same on all devices like those that are not."""
    varying = [_varying_axes(array) for array in arrays]
    missing = [tuple(frozenset[Any]().union(*varying) - axes) for axes in varying]
    return [
        lax.pcast(array, axes, to="varying") if axes else array
        for array, axes in zip(arrays, missing, strict=True)
    ]


def _varying_axes(array: Array) -> frozenset[Any]:
    kind: Any = jax.typeof(array)
    # The name differs between versions of JAX.
    axes: frozenset[Any] = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    return axes


def _rotated(
    kernels: forms.Kernels,
) -> Float[Array, "tasks rows columns filters channels"]:
    return kernels[:, ::-1, ::-1].swapaxes(3, 4)


def _window(kernels: Any) -> tuple[int, int]:
    rows, columns = kernels.aval.shape[1:3]
    return rows, columns


# Shapes. `update` keeps what else JAX knows of an array, such as its mesh axes.
convolution_p.def_abstract_eval(
    lambda x, k: x.update(shape=(*x.shape[:-1], k.shape[-1]), weak_type=False)
)
kernel_gradient_p.def_abstract_eval(
    lambda x, g, window: x.update(
        shape=(x.shape[0], *window, x.shape[-1], g.shape[-1]), weak_type=False
    )
)

# Outside `jit`: compile the one primitive.
convolution_p.def_impl(jax.jit(convolution_p.bind))
kernel_gradient_p.def_impl(jax.jit(kernel_gradient_p.bind, static_argnames="window"))

# Derivatives: the two equations at the top of this file.
ad.defbilinear(
    convolution_p,
    lambda dy, x, k: convolution_p.bind(dy, _rotated(k)),
    lambda dy, x, k: kernel_gradient_p.bind(x, dy, window=_window(k)),
)
ad.defbilinear(
    kernel_gradient_p,
    lambda dk, x, g, window: convolution_p.bind(g, _rotated(dk)),
    lambda dk, x, g, window: convolution_p.bind(x, dk),
)


def _batch(
    primitive: Primitive,
    arrays: tuple[Array, Array],
    axes: tuple[int | None, int | None],
    **window: Any,
) -> tuple[Array, int]:
    """`vmap`: the new axis joins the tasks, or the examples when one kernel serves all."""
    one_kernel = arrays[1].shape[0] == 1
    if primitive is convolution_p and axes[0] is not None and axes[1] is None and one_kernel:
        images, kernel = jnp.moveaxis(arrays[0], axes[0], 0), arrays[1]
        result = convolution_p.bind(images.reshape(1, -1, *images.shape[3:]), kernel)
        return result.reshape(*images.shape[:3], *result.shape[2:]), 0
    size = next(a.shape[i] for a, i in zip(arrays, axes, strict=True) if i is not None)
    first, second = (
        jnp.broadcast_to(a, (size, *a.shape)) if i is None else jnp.moveaxis(a, i, 0)
        for a, i in zip(arrays, axes, strict=True)
    )
    result = primitive.bind(
        first.reshape(-1, *first.shape[2:]), second.reshape(-1, *second.shape[2:]), **window
    )
    return result.reshape(size, -1, *result.shape[1:]), 0


def _lower(primitive: Primitive, cpu: Any, default: Any) -> None:
    mlir.register_lowering(primitive, mlir.lower_fun(default, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")


batching.primitive_batchers[convolution_p] = partial(_batch, convolution_p)
batching.primitive_batchers[kernel_gradient_p] = partial(_batch, kernel_gradient_p)
_lower(convolution_p, forms.convolve_in_turn, forms.convolve_together)
_lower(kernel_gradient_p, forms.kernel_gradient_in_turn, forms.kernel_gradient_together)
