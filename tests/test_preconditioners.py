"""Every preconditioner with every Krylov solver: against the dense inverse, and what it saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import refused
from jax.flatten_util import ravel_pytree

import memmeta as mm
from memmeta import linear_solve

pytestmark = pytest.mark.slow

KRYLOV = [name for name in linear_solve.SOLVERS if name not in ("direct", "neumann", "woodbury")]
PRECONDITIONERS = {name: make() for name, make in linear_solve.PRECONDITIONERS.items()} | {
    "jacobi-block": linear_solve.jacobi(4, block=3)
}
PRODUCTS = {
    "gauss_newton": mm.problem.gauss_newton_product,
    "hessian": lambda *where: mm.problem.hessian_product(*where)[1],
}


@functools.cache
def network():
    """A small network that adapts whole, held to zero: problem, φ, context, b, in float64."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"one": {"kernel": (3, 4), "bias": (4,)}, "two": {"kernel": (4, 2), "bias": (2,)}}
    draw = lambda key: jax.tree.map(  # noqa: E731
        lambda shape: jax.random.normal(key, shape, jnp.float64),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    inputs = jax.random.normal(keys[0], (6, 3), jnp.float64)

    def composite(context):
        def outputs(phi):
            hidden = jnp.tanh(context @ phi["one"]["kernel"] + phi["one"]["bias"])
            return hidden @ phi["two"]["kernel"] + phi["two"]["bias"]

        return mm.problem.Composite(outputs, lambda z: -jax.nn.log_softmax(z)[:, 0].mean(), 0.1)

    def inner_loss(phi, context):
        fit = composite(context)
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(phi))
        return fit.loss(fit.outputs(phi)) + 0.5 * fit.ridge * squares

    structure = mm.Structure(composite=composite)
    problem = mm.Problem(
        lambda theta, batch: batch,
        inner_loss,
        lambda phi, context: (inner_loss(phi, context), {}),
        lambda theta: theta,
        structure=structure,
    )
    return problem, draw(keys[1]), inputs, draw(keys[2])


def dense(product, like):
    flat, unravel = ravel_pytree(like)
    columns = jax.vmap(lambda e: ravel_pytree(product(unravel(e)))[0])(jnp.eye(flat.size))
    return np.asarray(columns).T


@functools.cache
def reference(kind):
    problem, params, context, b = network()
    return dense(jax.jit(PRODUCTS[kind](problem, params, context)), b)


def solved(solver, kind="gauss_newton"):
    problem, params, context, b = network()
    where = {"problem": problem, "params": params, "context": context}
    return jax.jit(lambda b: solver(PRODUCTS[kind](problem, params, context), b, **where))(b)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_are_those_of_the_dense_matrix(kind, x64):
    """The Hessian by `jax.hessian`; Gauss–Newton's written out as Jᵀ ∂²ℓ J + ρ I."""
    problem, params, context, _ = network()
    flat, unravel = ravel_pytree(params)
    expected = jax.hessian(lambda x: problem.inner_loss(unravel(x), context))(flat)
    if kind == "gauss_newton":
        fit = problem.structure.composed(context)
        outputs = lambda x: fit.outputs(unravel(x)).ravel()  # noqa: E731
        jacobian = jax.jacrev(outputs)(flat)
        loss = jax.hessian(lambda z: fit.loss(z.reshape(6, 2)))(outputs(flat))
        expected = jacobian.T @ loss @ jacobian + fit.ridge * jnp.eye(flat.size)
    np.testing.assert_allclose(reference(kind), expected, atol=1e-8)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("name", KRYLOV)
def test_conformance(name, preconditioner, x64):
    """The dense inverse's answer, and an honest count, with a tolerance and without."""
    make, chosen = linear_solve.SOLVERS[name], PRECONDITIONERS[preconditioner]
    exact = np.linalg.solve(reference("gauss_newton"), ravel_pytree(network()[3])[0])
    fixed = solved(make(steps=40, preconditioner=chosen))
    early = solved(make(steps=200, tolerance=1e-11, preconditioner=chosen))
    for found in (fixed, early):
        np.testing.assert_allclose(ravel_pytree(found.value)[0], exact, atol=1e-8)
        assert found.status == 0
    assert early.products < fixed.products


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_every_inverse_is_symmetric_and_positive(preconditioner, x64):
    problem, params, context, b = network()
    for kind, make in PRODUCTS.items():  # the Hessian is indefinite without its proximal term
        product = make(problem, params, context)
        if kind == "hessian":
            product = lambda x, p=product: jax.tree.map(lambda a, y: a - 0.1 * y, p(x), x)  # noqa: E731
        system = linear_solve.System(product, b, 0.0, problem, params, context)
        matrix = dense(jax.jit(PRECONDITIONERS[preconditioner](system)[0]), b)
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-10 * np.abs(matrix).max())
        assert np.linalg.eigvalsh(matrix)[0] > 0


def test_nystrom_takes_the_large_eigenvalues_away(x64):
    spectrum = jnp.concatenate([jnp.geomspace(1e4, 10.0, 10), jnp.linspace(1.0, 2.0, 60)])
    b = jax.random.normal(jax.random.key(1), spectrum.shape)
    solve = lambda **kw: linear_solve.cg(200, tolerance=1e-8, **kw)(lambda x: spectrum * x, b)  # noqa: E731
    plain, helped = solve(), solve(preconditioner=linear_solve.nystrom(20))
    assert helped.residual < 1e-7
    assert helped.products < plain.products
    assert 2 * int(helped.iterations) < int(plain.iterations)


def test_a_sketch_leaves_a_known_ridge_out(x64):
    """400 parameters, 6 directions of curvature: a sketch of A itself would see the ridge alone."""
    features = jax.random.normal(jax.random.key(0), (6, 400)) / 20
    ridge = 0.1
    structure = mm.Structure(
        composite=lambda context: mm.problem.Composite(
            lambda phi: features @ phi, lambda z: 0.5 * jnp.sum(z**2), ridge
        )
    )
    problem = mm.Problem(
        lambda theta, batch: batch,
        lambda phi, context: 0.5 * jnp.sum((features @ phi) ** 2) + 0.5 * ridge * jnp.sum(phi**2),
        lambda phi, context: (jnp.sum(phi), {}),
        lambda theta: theta,
        structure=structure,
    )
    params, b = jnp.zeros(400), jax.random.normal(jax.random.key(1), (400,))
    found = linear_solve.cg(20, tolerance=1e-10, preconditioner=linear_solve.nystrom(6))(
        mm.problem.hessian_product(problem, params, None)[1],
        b,
        problem=problem,
        params=params,
        context=None,
    )
    exact = np.linalg.solve(features.T @ features + ridge * np.eye(400), b)
    np.testing.assert_allclose(found.value, exact, atol=1e-8)
    assert found.iterations <= 2


def test_blocks_are_exact_where_the_matrix_has_no_others(x64):
    blocks = jax.random.normal(jax.random.key(0), (4, 3, 3))
    blocks = jnp.einsum("nij,nkj->nik", blocks, blocks) + 0.1 * jnp.eye(3)
    product = lambda x: jnp.einsum("nij,nj->ni", blocks, x.reshape(4, 3)).reshape(-1)  # noqa: E731
    chosen = linear_solve.jacobi(1, block=3)
    found = linear_solve.cg(1, preconditioner=chosen)(product, jnp.arange(1.0, 13.0))
    assert found.residual < 1e-10


@pytest.mark.parametrize("name", KRYLOV)
def test_a_preconditioner_that_is_not_positive_is_said(name):
    bad = lambda system: (lambda r: -r, 0)  # noqa: E731
    b = jnp.ones(4)
    found = linear_solve.SOLVERS[name](4, preconditioner=bad)(lambda x: 2 * x, b)
    assert np.all(np.isfinite(found.value))
    assert linear_solve.explain(found).startswith("Preconditioner not positive")


def test_kronecker_without_layers_is_refused():
    solver = linear_solve.cg(4, preconditioner=linear_solve.kronecker())
    with pytest.raises(ValueError, match=r"kronecker: expected a problem with a `structure\.comp"):
        solver(lambda x: x, jnp.ones(2))


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: linear_solve.jacobi(3), "probes", "expected a power of two, found 3"),
        (lambda: linear_solve.jacobi(block=0), "block", "expected a whole number, 1 or more"),
        (lambda: linear_solve.nystrom(0), "rank", "expected a whole number, 1 or more"),
        (lambda: linear_solve.kronecker(0.5), "probes", "expected a whole number, 1 or more"),
    ],
)
def test_bad_arguments_are_named(make, name, message):
    with refused(name, message):
        make()
