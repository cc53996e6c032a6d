"""lineax's solvers under memmeta's rules, and memmeta's rule under optimistix's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memmeta import linear_solve

lineax = pytest.importorskip("lineax")
optimistix = pytest.importorskip("optimistix")

MATRIX = jnp.array([[3.0, 1.0, 0.0], [-1.0, 2.0, 0.5], [0.3, 0.0, 1.0]])
B = jnp.array([1.0, 2.0, 3.0])


def test_solvers_agree(x64):
    matrix, b = MATRIX.astype(jnp.float64), B.astype(jnp.float64)
    exact = np.linalg.solve(matrix, b)
    for solver in (lineax.GMRES(1e-12, 1e-12), lineax.BiCGStab(1e-12, 1e-12), lineax.LU()):
        found = jax.jit(lambda b, s=solver: linear_solve.from_lineax(s)(lambda x: matrix @ x, b))(b)
        np.testing.assert_allclose(found.value, exact, atol=1e-8)
        assert found.status == 0
        assert found.residual < 1e-8
    for make in (linear_solve.gmres, linear_solve.bicgstab, linear_solve.normal_cg):
        np.testing.assert_allclose(make(9)(lambda x: matrix @ x, b).value, exact, atol=1e-8)


def test_its_failure_is_a_status():
    singular = linear_solve.from_lineax(lineax.LU())(lambda x: 0 * x, B)
    assert linear_solve.explain(singular).startswith(("Broken down", "Failed"))
    assert np.all(np.isfinite(singular.value))
    short = linear_solve.from_lineax(lineax.GMRES(1e-6, 1e-6, max_steps=1, restart=1))
    assert linear_solve.explain(short(lambda x: MATRIX @ x, B)).startswith(("Not solved", "Broken"))


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_optimistix_gets_the_same_derivative(mode, x64):
    """Of a minimiser and, with a Jacobian that is not symmetric, of a fixed point."""
    matrix, b = MATRIX.astype(jnp.float64), B.astype(jnp.float64)

    def minimum(c, **adjoint):
        solver = optimistix.BFGS(rtol=1e-10, atol=1e-10)
        loss = lambda y, c: jnp.sum(jnp.cosh(y - c)) + 0.5 * jnp.sum((matrix @ y) ** 2)  # noqa: E731
        return optimistix.minimise(loss, solver, jnp.zeros(3), c, **adjoint).value

    def fixed(c, **adjoint):
        solver = optimistix.FixedPointIteration(rtol=1e-12, atol=1e-12)
        step = lambda y, c: jnp.tanh(0.2 * matrix @ y + c)  # noqa: E731
        return optimistix.fixed_point(step, solver, jnp.zeros(3), c, **adjoint).value

    cases = ((minimum, linear_solve.cg(9)), (fixed, linear_solve.gmres(9)))
    for function, solver in cases:
        adjoint = linear_solve.optimistix_adjoint(solver)
        found = jax.jit(mode(lambda c, f=function, a=adjoint: f(c, adjoint=a)))(b)
        np.testing.assert_allclose(found, mode(function)(b), atol=1e-7)
