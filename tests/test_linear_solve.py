"""One conformance test over the list of linear solvers, and what each of them alone promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memmeta as mm
from memmeta import few_shot, linear_solve, trees

SIZE = 8
GENERAL = {
    "cg": linear_solve.cg(3 * SIZE),
    "cg-jacobi": linear_solve.cg(3 * SIZE, diagonal=linear_solve.jacobi(4)),
    "direct": linear_solve.direct(),
    "minres": linear_solve.minres(3 * SIZE),
    "minres-jacobi": linear_solve.minres(3 * SIZE, diagonal=linear_solve.jacobi(4)),
    "neumann": linear_solve.neumann(400),
}


@functools.cache
def compiled(name):
    """One compilation per solver and dtype for all tests: (matrix, b) -> solution."""
    return jax.jit(functools.partial(solve, name))


def solve(name, matrix, b):
    return GENERAL[name](lambda x: matrix @ x, b)


INDEFINITE = ("direct", "minres", "minres-jacobi")
SPECTRA = {
    "definite": np.geomspace(1, 10, SIZE),
    "indefinite": np.concatenate([[-3, -1], np.linspace(1, 6, SIZE - 2)]),
    "singular": np.concatenate([[0, 0], np.linspace(1, 6, SIZE - 2)]),
}


def system(spectrum, dtype=np.float64, seed=0):
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.normal(size=(SIZE, SIZE)))[0]
    matrix = basis @ np.diag(spectrum) @ basis.T
    return matrix.astype(dtype), generator.normal(size=SIZE).astype(dtype), basis


def test_every_solver_of_the_list_is_tested():
    assert {name.split("-")[0] for name in GENERAL} | {"woodbury"} == set(linear_solve.SOLVERS)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("name", GENERAL)
def test_conformance(name, kind, x64):
    """Right where the solver can be right; honest everywhere: residual and curvature are true."""
    matrix, b, _ = system(SPECTRA[kind])
    if kind == "singular":  # a right-hand side in the range of A
        b = matrix @ b
    found = compiled(name)(matrix, b)
    assert np.all(np.isfinite(found.value))
    true_residual = np.linalg.norm(b - matrix @ found.value) / np.linalg.norm(b)
    np.testing.assert_allclose(found.residual, true_residual, atol=1e-12)
    assert SPECTRA[kind][0] - 1e-9 <= found.curvature <= SPECTRA[kind][-1] + 1e-9
    if kind == "indefinite":
        assert found.curvature < 0
    if kind == "definite" or name in INDEFINITE:
        assert found.residual < 1e-9
    if kind == "singular":
        assert found.residual < 1e-9
        np.testing.assert_allclose(found.value, np.linalg.pinv(matrix) @ b, atol=1e-8) if (
            "jacobi" not in name
        ) else None


@pytest.mark.parametrize("name", GENERAL)
def test_singular_and_inconsistent_stays_finite(name, x64):
    matrix, _, basis = system(SPECTRA["singular"])
    b = matrix @ np.ones(SIZE) + basis[:, 0]
    found = compiled(name)(matrix, b)
    outside = np.linalg.norm(basis[:, :2].T @ b) / np.linalg.norm(b)
    assert np.all(np.isfinite(found.value))
    assert found.residual >= outside - 1e-12
    if name in ("direct", "minres"):  # the least-squares answer
        assert found.residual < outside + 1e-9


@pytest.mark.parametrize("name", GENERAL)
def test_scale_does_not_matter(name):
    matrix, b, _ = system(SPECTRA["definite"], np.float32)
    plain = compiled(name)(matrix, b)
    for scale in (1e-30, 1e30):
        found = compiled(name)(matrix, b * np.float32(scale))
        np.testing.assert_allclose(found.value / scale, plain.value, rtol=1e-4, atol=1e-5)
        assert found.residual < 1e-5


@pytest.mark.parametrize("name", GENERAL)
def test_zero_and_nan(name):
    matrix, b, _ = system(SPECTRA["definite"], np.float32)
    solve = compiled(name)
    nothing = solve(matrix, 0 * b)
    assert np.all(nothing.value == 0)
    assert nothing.residual == 0
    assert not np.isnan(nothing.curvature)
    broken = solve(matrix * np.float32("nan"), b)
    assert np.all(np.isfinite(broken.value))
    assert np.isinf(broken.residual)
    assert not np.isnan(broken.curvature)
    poisoned = solve(matrix, b.astype(np.float32) * np.float32("nan"))
    assert np.isinf(poisoned.residual)
    assert linear_solve.explain(broken).startswith("Failed")


@pytest.mark.parametrize("name", ["cg", "minres", "neumann"])
def test_a_stalled_solve_says_so(name):
    """Too few steps for the condition number: the residual is true, and explained."""
    matrix, b, _ = system(np.geomspace(1e-3, 1, SIZE), np.float32)
    found = linear_solve.SOLVERS[name](steps=2)(lambda x: matrix @ x, b)
    true = np.linalg.norm(b - matrix @ found.value) / np.linalg.norm(b)
    np.testing.assert_allclose(found.residual, true, rtol=1e-3)
    assert found.residual > 0.1
    assert linear_solve.explain(found).startswith("Not solved")


@pytest.mark.parametrize("name", GENERAL)
def test_vmap_is_a_loop(name, x64):
    matrices, sides = zip(*(system(SPECTRA["definite"], seed=s)[:2] for s in range(3)), strict=True)
    matrices, sides = jnp.stack(matrices), jnp.stack(sides)
    every = jax.jit(jax.vmap(functools.partial(solve, name)))
    together = every(matrices, sides)
    for i in range(3):
        alone = compiled(name)(matrices[i], sides[i])
        np.testing.assert_allclose(together.value[i], alone.value, rtol=1e-9, atol=1e-12)
    broken = every(matrices.at[1].set(jnp.nan), sides)
    assert np.isinf(broken.residual[1])
    for i in (0, 2):  # the task between them poisons neither
        np.testing.assert_array_equal(broken.value[i], together.value[i])


@pytest.mark.parametrize("name", ["cg", "direct", "minres", "neumann"])
def test_damping_and_warm_start(name, x64):
    matrix, b, _ = system(SPECTRA["definite"])
    long, short = ({}, {}) if name == "direct" else ({"steps": 200}, {"steps": 2})
    make = linear_solve.SOLVERS[name]

    @jax.jit
    def run(b, start):
        damped = make(damping=2.0, **long)(lambda x: matrix @ x, b)
        return damped, make(**short)(lambda x: matrix @ x, b, start=start)

    solution = np.linalg.solve(matrix, b)
    damped, warm = run(b, solution + 1e-6)
    exact = np.linalg.solve(matrix + 2 * np.eye(SIZE), b)
    np.testing.assert_allclose(damped.value, exact, rtol=1e-8)
    # the residual is that of the system asked about, not of the damped one
    true = np.linalg.norm(b - matrix @ exact) / np.linalg.norm(b)
    np.testing.assert_allclose(damped.residual, true, rtol=1e-7)
    assert damped.curvature >= 1 - 1e-9
    assert warm.residual < 1e-5
    cold = run(b, 0 * b)[1].value
    for useless in (1e8 * solution, np.nan * solution):
        np.testing.assert_allclose(run(b, useless)[1].value, cold, rtol=1e-9)


def test_jacobi_solves_a_badly_scaled_system(x64):
    generator = np.random.default_rng(1)
    scales = np.geomspace(1, 1e4, SIZE)
    basis = np.linalg.qr(generator.normal(size=(SIZE, SIZE)))[0]
    core = basis @ np.diag(np.linspace(1, 2, SIZE)) @ basis.T
    matrix, b = scales[:, None] * core * scales, generator.normal(size=SIZE)
    plain = linear_solve.cg(SIZE)(lambda x: matrix @ x, b)
    helped = linear_solve.cg(SIZE, diagonal=linear_solve.jacobi(SIZE))(lambda x: matrix @ x, b)
    assert helped.residual < 1e-4 < 1e-2 < plain.residual
    estimate = linear_solve.jacobi(8)(lambda x: matrix @ x, b)
    np.testing.assert_allclose(estimate, np.diag(matrix), rtol=1e-9)


@pytest.mark.parametrize("name", GENERAL)
def test_bfloat16_vectors_with_float32_sums(name):
    matrix, b, _ = system(SPECTRA["definite"], np.float32)
    side = {"x": jnp.asarray(b[:3], jnp.bfloat16), "y": jnp.asarray(b[3:], jnp.bfloat16)}

    def product(tree):
        flat = jnp.concatenate([tree["x"], tree["y"]]).astype(jnp.float32)
        image = (matrix @ flat).astype(jnp.bfloat16)
        return {"x": image[:3], "y": image[3:]}

    found = jax.jit(lambda side: GENERAL[name](product, side))(side)
    assert found.value["x"].dtype == jnp.bfloat16
    assert found.residual.dtype == jnp.float32
    exact = np.linalg.solve(matrix, np.concatenate([side["x"], side["y"]]).astype(np.float32))
    error = np.concatenate([found.value["x"], found.value["y"]]).astype(np.float32) - exact
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(exact)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-10, 10, width=32), min_size=SIZE, max_size=SIZE),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=SIZE, max_size=SIZE),
)
def test_never_nan_and_always_honest(spectrum, side):
    """Whatever the system: finite answers, the true residual, a Rayleigh quotient as curvature."""
    spectrum, side = np.float32(spectrum), np.float32(side)
    for name in ("cg", "minres", "neumann", "direct"):
        found = compiled(name)(np.diag(spectrum), side)
        assert np.all(np.isfinite(found.value))
        assert not np.isnan(found.curvature)
        if np.linalg.norm(side) > 0 and np.all(np.abs(np.asarray(found.value)) < 1e15):
            true = np.linalg.norm(side - spectrum * np.float64(found.value))
            scale = np.linalg.norm(side) + np.linalg.norm(spectrum * np.float64(found.value))
            np.testing.assert_allclose(
                found.residual * np.linalg.norm(side), true, atol=1e-4 * scale
            )


HEADS = {"softmax": few_shot.softmax_problem, "squared": few_shot.squared_problem}


def head_system(loss, ridge, ways=3, samples=4, features=6):
    keys = jax.random.split(jax.random.key(3), 3)
    context = few_shot.HeadContext(
        jax.random.normal(keys[0], (samples, features)),
        jnp.arange(samples) % ways,
        jax.random.normal(keys[1], (samples, features)),
        jnp.arange(samples) % ways,
        jnp.ones(samples).at[0].set(0.0),
    )
    init = {"kernel": jnp.zeros((features, ways)), "bias": jnp.zeros(ways)}
    return HEADS[loss](lambda t, b: b, lambda t: init, ridge), context, init


def a_side(init):
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), init)


@functools.partial(jax.jit, static_argnums=(0, 4))
def solve_both(problem, context, init, b, damping):
    where = {"problem": problem, "params": init, "context": context}
    product = jax.linearize(lambda p: jax.grad(problem.inner_loss)(p, context), init)[1]
    woodbury, direct = linear_solve.woodbury(damping=damping), linear_solve.direct(damping=damping)
    return woodbury(product, b, **where), direct(product, b)


@pytest.mark.parametrize("loss", HEADS)
@pytest.mark.parametrize(("ridge", "damping"), [(0.1, 0.0), (1e-6, 0.0), (0.0, 0.1)])
def test_woodbury_agrees_with_the_dense_solve(loss, ridge, damping, x64):
    problem, context, init = head_system(loss, ridge)
    found, exact = solve_both(problem, context, init, a_side(init), damping)
    error = trees.norm(jax.tree.map(jnp.subtract, found.value, exact.value))
    assert error < 1e-8 * trees.norm(exact.value)
    np.testing.assert_allclose(found.residual, exact.residual, atol=1e-8)


@pytest.mark.parametrize("loss", HEADS)
def test_woodbury_in_float32_whatever_the_scale(loss):
    """One program: right at any scale, zero for zero, and alone in its failure on NaN features."""
    problem, context, init = head_system(loss, 1e-3)
    broken = context._replace(support_features=context.support_features.at[0].set(jnp.nan))
    contexts = jax.tree.map(lambda *x: jnp.stack(x), context, broken, context, context, context)
    scales = jnp.array([1.0, 1.0, 1e-30, 1e30, 0.0])

    @jax.jit
    @jax.vmap
    def solve(context, scale):
        product = jax.linearize(lambda p: jax.grad(problem.inner_loss)(p, context), init)[1]
        side = jax.tree.map(lambda x: scale * x, a_side(init))
        where = {"problem": problem, "params": init, "context": context}
        return linear_solve.woodbury()(product, side, **where)

    found = solve(contexts, scales)
    assert np.all(found.residual[jnp.array([0, 2, 3])] < 1e-3)
    assert np.isinf(found.residual[1])
    assert found.residual[4] == 0
    values = jax.vmap(lambda x: trees.ravel(x)[0])(found.value)
    assert np.all(np.isfinite(values))
    assert np.all(values[4] == 0)
    for i in (2, 3):
        np.testing.assert_allclose(values[i] / scales[i], values[0], rtol=1e-3, atol=1e-4)


def test_woodbury_without_ridge_or_head():
    problem, context, init = head_system("softmax", 0.0)
    found, _ = solve_both(problem, context, init, a_side(init), 0.0)
    assert np.isinf(found.residual)
    assert trees.all_finite(found.value)
    assert linear_solve.explain(found).startswith("Failed")
    headless = mm.Problem(problem.embed, problem.inner_loss, problem.outer_loss, problem.init)
    with pytest.raises(ValueError, match=r"expected a problem with a `structure\.head`"):
        linear_solve.woodbury()(lambda x: x, init, problem=headless, params=init, context=context)


@pytest.mark.parametrize("bad", [-1, 2.5, "3"])
@pytest.mark.parametrize("name", ["cg", "minres", "neumann"])
def test_bad_arguments_are_named(name, bad):
    with pytest.raises((ValueError, Exception), match="steps"):
        linear_solve.SOLVERS[name](steps=bad)
    with pytest.raises(ValueError, match="damping: expected a finite number, 0 or more, found -1"):
        linear_solve.SOLVERS[name](damping=-1.0)


def test_explanations_name_the_remedy(x64):
    definite, b, _ = system(SPECTRA["definite"])
    indefinite, _, _ = system(SPECTRA["indefinite"])
    good = linear_solve.explain(linear_solve.cg(20)(lambda x: definite @ x, b))
    assert good.startswith("Solved")
    bad = linear_solve.explain(linear_solve.cg(20)(lambda x: indefinite @ x, b))
    assert "minres" in bad
    assert "Take more steps" in linear_solve.explain(linear_solve.cg(1)(lambda x: definite @ x, b))
