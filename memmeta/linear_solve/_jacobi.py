"""The diagonal, or diagonal blocks, of a matrix that is known by its products, to divide by."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.linear_solve._solution import Preconditioner, Product, System, Vector


@named
def jacobi(probes: int = 16, *, block: int = 1) -> Preconditioner:
    r"""The (block-)diagonal preconditioner: M = diag(A) + λ I, estimated from products.

    $$\operatorname{diag}(A) \approx \frac1m \sum_{j=1}^m z_j \odot A z_j$$

    with z_j the signs of the first m rows of a Hadamard matrix, so no random key is needed; for
    blocks, one sign for each block and one probe for each of its columns. Exact where A is zero
    between all blocks whose numbers are equal modulo m: for every A of m blocks or fewer.

    M is made positive: of an entry or eigenvalue its size is taken, and a thousandth of the largest
    where it is smaller than that.

    Args:
        probes: m, a power of two; m · block products are made, one after the other.
        block: the size of the blocks, counted along φ as one vector. A linear head's kernel is
            [features, ways]: blocks of `ways` couple the classes of each feature.

    Returns:
        The preconditioner.

    Raises:
        ValueError: `probes` is no power of two, or `block` no whole number, 1 or more.

    Source: Bekas, Kokiopoulou, Saad (2007), section 3.

    Example:
        >>> from memmeta.linear_solve import cg
        >>> scales = jnp.array([2.0, 500.0, 1.0])
        >>> found = cg(1, preconditioner=jacobi(4))(lambda x: scales * x, jnp.ones(3))
        >>> float(found.residual) < 1e-6
        True
    """
    checks.count("probes", probes)
    checks.require("probes", probes, not probes & (probes - 1), "a power of two")
    checks.count("block", block)

    def preconditioner(system: System) -> tuple[Product, int]:
        flat, unravel = trees.ravel(system.like)
        padding = -flat.size % block
        values, vectors = _inverse(diagonal_blocks(system, probes, block), system.damping)

        def inverse(r: Vector) -> Vector:
            rows = jnp.pad(trees.ravel(r)[0], (0, padding)).reshape(-1, block)
            if block == 1:
                rows = rows * values
            else:
                inside = jnp.einsum("nij,ni->nj", vectors, rows) * values
                rows = jnp.einsum("nij,nj->ni", vectors, inside)
            return unravel(rows.reshape(-1)[: flat.size])

        return inverse, probes * block

    return preconditioner


def diagonal_blocks(
    system: System, probes: int, block: int
) -> Float[Array, "blocks {block} {block}"]:
    """The diagonal blocks of A, see `jacobi`.

    Example:
        >>> system = System(lambda x: jnp.array([2.0, 5.0, 1.0]) * x, jnp.ones(3))
        >>> diagonal_blocks(system, 4, 1).ravel().tolist()
        [2.0, 5.0, 1.0]
    """
    flat, unravel = trees.ravel(system.like)
    padding = -flat.size % block
    number = jnp.arange((flat.size + padding) // block)

    def column(index: Array) -> Array:
        unit = (jnp.arange(block) == index).astype(flat.dtype)

        def add(total: Array, row: Array) -> tuple[Array, None]:
            # entry (row, column) of the Hadamard matrix: the parity of the bits they share
            parity = jax.lax.population_count(row & (number % probes)) % 2
            signs = (1 - 2 * parity).astype(flat.dtype)[:, None]
            z = (signs * unit).reshape(-1)[: flat.size]
            image = jnp.pad(trees.ravel(system.product(unravel(z)))[0], (0, padding))
            return total + signs * image.reshape(-1, block) / probes, None

        zeros = jnp.zeros((number.size, block), flat.dtype)
        return jax.lax.scan(add, zeros, jnp.arange(probes))[0]

    return jnp.moveaxis(jax.lax.map(column, jnp.arange(block)), 0, -1)


def _inverse(blocks: Array, damping: float) -> tuple[Array, Array]:
    """1/(|λ| + damping) and the eigenvectors of every block, with λ kept from zero."""
    if blocks.shape[-1] == 1:  # no `eigh` for a hundred thousand numbers
        values, vectors = blocks[..., 0], jnp.ones_like(blocks)
    else:
        finite = jnp.all(jnp.isfinite(blocks), axis=(-2, -1), keepdims=True)
        symmetric = (blocks + jnp.swapaxes(blocks, -2, -1)) / 2
        values, vectors = jnp.linalg.eigh(jnp.where(finite, symmetric, 0))
    sizes = jnp.abs(values)
    largest = jnp.max(jnp.where(jnp.isfinite(sizes), sizes, 0))
    # An estimate near zero would blow its entry up.
    floored = jnp.maximum(sizes, jnp.where(largest > 0, 1e-3 * largest, 1))
    return 1 / (jnp.where(jnp.isfinite(floored), floored, 1) + damping), vectors
