"""One conformance test over the list of linear solvers, and what each of them alone promises."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from assertions import refused, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import memmeta as mm
from memmeta import few_shot, linear_solve

SIZE = 8
KRYLOV = [name for name in linear_solve.SOLVERS if name not in ("direct", "neumann", "woodbury")]
STEPS = dict.fromkeys(KRYLOV, 3 * SIZE) | {"neumann": 400}
SOLVERS = {
    name: make(**({"steps": STEPS[name]} if name in STEPS else {}))
    for name, make in linear_solve.SOLVERS.items()
} | {
    f"{name}-jacobi": linear_solve.SOLVERS[name](3 * SIZE, preconditioner=linear_solve.jacobi(4))
    for name in KRYLOV
}
GENERAL = [name for name in SOLVERS if name != "woodbury"]
"""Those that need no linear head: they are tested on any matrix, too."""


HEADS = {"softmax": few_shot.softmax_problem, "squared": few_shot.squared_problem}


class Head(NamedTuple):
    """The system of a linear head with SIZE parameters; some of its context are integers."""

    problem: mm.Problem
    params: dict
    context: few_shot.HeadContext
    b: dict

    def product(self):
        return mm.problem.hessian_product(self.problem, self.params, self.context)[1]

    def matrix(self):
        flat, unravel = ravel_pytree(self.params)
        return jax.hessian(lambda x: self.problem.inner_loss(unravel(x), self.context))(flat)


def head(loss="squared", ridge=0.5, seed=0, dtype=None):
    ways, samples, features = 2, 4, 3
    keys = jax.random.split(jax.random.key(seed), 3)
    context = few_shot.HeadContext(
        jax.random.normal(keys[0], (samples, features), dtype),
        jnp.arange(samples) % ways,
        jax.random.normal(keys[1], (samples, features), dtype),
        jnp.arange(samples) % ways,
        jnp.ones(samples, dtype).at[0].set(0.0),
    )
    params = {"kernel": jnp.zeros((features, ways), dtype), "bias": jnp.zeros(ways, dtype)}
    flat, unravel = ravel_pytree(params)
    b = unravel(jax.random.normal(keys[2], flat.shape, flat.dtype))
    problem = HEADS[loss](lambda t, b: b, lambda t: params, ridge)
    return Head(problem, params, context, b)


def solve_head(name, context, b):
    system = head(dtype=b["bias"].dtype)._replace(context=context)
    where = {"problem": system.problem, "params": system.params, "context": context}
    return SOLVERS[name](system.product(), b, **where)


@functools.cache
def compiled_head(name):
    """One program a solver and dtype for all tests: (context, b) -> solution."""
    return jax.jit(functools.partial(solve_head, name))


TOLERANCES = {jnp.float64: 1e-10, jnp.float32: 1e-5, jnp.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", SOLVERS)
def test_conformance(name, dtype):
    """The exact answer in its dtype, with a true residual and a curvature of the spectrum."""
    with jax.enable_x64(dtype == jnp.float64):
        system = head(dtype=dtype)
        found = compiled_head(name)(system.context, system.b)
        chex.assert_trees_all_equal_shapes_and_dtypes(found.value, system.b)
        chex.assert_shape((found.residual, found.curvature, found.iterations), ())
        matrix, b, value = dense(system, found.value)
        tolerance, exact = TOLERANCES[dtype], np.linalg.solve(matrix, b)
        np.testing.assert_allclose(value, exact, atol=tolerance * np.linalg.norm(exact))
        residual = np.linalg.norm(b - matrix @ value) / np.linalg.norm(b)
        np.testing.assert_allclose(found.residual, residual, atol=tolerance)
        smallest, *_, largest = np.linalg.eigvalsh(matrix)
        assert smallest - tolerance <= found.curvature <= largest + tolerance


def dense(system, value):
    """Matrix, right-hand side and answer of a system, in float32 at least."""
    dtype = system.b["bias"].dtype
    like = head(dtype=jnp.float32 if dtype == jnp.bfloat16 else dtype)
    parts = (system.params, system.context, system.b, value)
    wide = (like.params, like.context, like.b, like.b)
    params, context, b, value = jax.tree.map(lambda x, w: x.astype(w.dtype), parts, wide)
    matrix = like._replace(params=params, context=context).matrix()
    return np.asarray(matrix), *(np.asarray(ravel_pytree(x)[0]) for x in (b, value))


@pytest.mark.parametrize("name", SOLVERS)
def test_scale_zero_and_nan(name):
    """Right at any scale, zero for zero, and a failure that is said where products are NaN."""
    system, run = head(dtype=jnp.float32), compiled_head(name)
    plain = run(system.context, system.b)
    for scale in (1e-30, 1e30):
        found = run(system.context, jax.tree.map(lambda x, s=scale: jnp.float32(s) * x, system.b))
        unscaled = jax.tree.map(lambda x, s=scale: x / jnp.float32(s), found.value)
        chex.assert_trees_all_close(unscaled, plain.value, rtol=1e-4, atol=1e-5)
        assert found.residual < 1e-4  # float32: 1.02e-5 measured with XLA's optimiser on
    nothing = run(system.context, jax.tree.map(jnp.zeros_like, system.b))
    chex.assert_trees_all_equal(nothing.value, system.params)
    assert nothing.residual == 0
    assert not np.isnan(nothing.curvature)
    features = jnp.full_like(system.context.support_features, jnp.nan)
    broken = run(system.context._replace(support_features=features), system.b)
    chex.assert_tree_all_finite(broken.value)
    assert np.isinf(broken.residual)
    assert not np.isnan(broken.curvature)
    assert linear_solve.explain(broken).startswith("Failed: the system or its solution is not")
    assert np.isinf(run(system.context, jax.tree.map(lambda x: x * jnp.nan, system.b)).residual)


@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_is_a_loop(name, x64):
    systems = [head(seed=seed, dtype=jnp.float64) for seed in range(3)]
    stack = lambda *x: jnp.stack(x)  # noqa: E731
    contexts = jax.tree.map(stack, *(system.context for system in systems))
    sides = jax.tree.map(stack, *(system.b for system in systems))
    every = jax.jit(jax.vmap(functools.partial(solve_head, name)))
    together = every(contexts, sides)
    apart = [compiled_head(name)(system.context, system.b) for system in systems]
    apart = jax.tree.map(stack, *apart)
    chex.assert_trees_all_close(together.value, apart.value, rtol=1e-9, atol=1e-12)
    spoilt = contexts.support_features.at[1].set(jnp.nan)
    broken = every(contexts._replace(support_features=spoilt), sides)
    assert np.isinf(broken.residual[1])
    others = lambda tree: jax.tree.map(lambda x: x[jnp.array([0, 2])], tree)  # noqa: E731
    chex.assert_trees_all_equal(others(broken.value), others(together.value))


class JitIsEager(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*SOLVERS)
    def test_jit_is_eager(self, name):
        system = head(dtype=jnp.float32)
        found = self.variant(functools.partial(solve_head, name))(system.context, system.b)
        exact = np.linalg.solve(system.matrix(), ravel_pytree(system.b)[0])
        np.testing.assert_allclose(ravel_pytree(found.value)[0], exact, atol=1e-5)


@pytest.mark.parametrize("name", GENERAL)
def test_odd_trees(name, x64):
    """Nested vectors with None among their leaves, and a product that uses integers and keys."""
    matrix, b, _ = system(SPECTRA["definite"])
    constants = {"order": jnp.arange(SIZE)[::-1], "key": jax.random.key(0)}
    side = {"x": b[:3], "nested": (b[3:].reshape(1, 5), None), "none": None}

    @jax.jit
    def run(side, constants):
        def product(tree):
            flat = jnp.concatenate([tree["x"], tree["nested"][0][0]])
            noise = 0 * jax.random.normal(constants["key"], (SIZE,))
            image = (matrix @ flat)[constants["order"]][constants["order"]] + noise
            return {"x": image[:3], "nested": (image[3:][None], None), "none": None}

        return SOLVERS[name](product, side)

    found = run(side, constants).value
    chex.assert_trees_all_equal_structs(found, side)
    exact = np.linalg.solve(matrix, b)
    np.testing.assert_allclose(found["x"], exact[:3], atol=1e-9)
    np.testing.assert_allclose(found["nested"][0][0], exact[3:], atol=1e-9)


@functools.cache
def compiled(name):
    """One compilation per solver and dtype for all tests: (matrix, b) -> solution."""
    return jax.jit(functools.partial(solve, name))


def solve(name, matrix, b):
    return SOLVERS[name](lambda x: matrix @ x, b)


INDEFINITE = [name for name in GENERAL if not name.startswith(("cg", "neumann"))]
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


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("name", GENERAL)
def test_conformance_on_any_spectrum(name, kind, x64):
    """Right where the solver can be right; honest everywhere: residual and curvature are true."""
    matrix, b, _ = system(SPECTRA[kind])
    if kind == "singular":  # a right-hand side in the range of A
        b = matrix @ b
    found = compiled(name)(matrix, b)
    assert np.all(np.isfinite(found.value))
    true_residual = np.linalg.norm(b - matrix @ found.value) / np.linalg.norm(b)
    np.testing.assert_allclose(found.residual, true_residual, atol=1e-12)
    assert SPECTRA[kind][0] - 1e-9 <= found.curvature <= SPECTRA[kind][-1] + 1e-9
    if kind == "indefinite" and not name.startswith("gmres"):  # which looks at no descent direction
        assert found.curvature < 0
    if kind == "definite" or name in INDEFINITE:
        assert found.residual < 1e-9
    if kind == "singular":
        assert found.residual < 1e-9
        if "jacobi" not in name:  # a preconditioner chooses another of the solutions
            np.testing.assert_allclose(found.value, np.linalg.pinv(matrix) @ b, atol=1e-8)


@pytest.mark.parametrize("name", GENERAL)
def test_singular_and_inconsistent_stays_finite(name, x64):
    matrix, _, basis = system(SPECTRA["singular"])
    b = matrix @ np.ones(SIZE) + basis[:, 0]
    found = compiled(name)(matrix, b)
    outside = np.linalg.norm(basis[:, :2].T @ b) / np.linalg.norm(b)
    assert np.all(np.isfinite(found.value))
    slack = 1e-12
    if name.startswith("bicgstab"):  # may go so far along the kernel that A x is mostly rounding
        slack += SIZE * 2.0**-52 * np.linalg.norm(matrix) * np.linalg.norm(found.value)
    assert found.residual >= outside - slack / np.linalg.norm(b)
    if name in ("direct", "minres"):  # the least-squares answer
        assert found.residual < outside + 1e-9


@pytest.mark.parametrize("name", ["cg", "minres", "neumann"])
def test_a_stalled_solve_says_so(name):
    """Too few steps for the condition number: the residual is true, and explained."""
    matrix, b, _ = system(np.geomspace(1e-3, 1, SIZE), np.float32)
    found = linear_solve.SOLVERS[name](steps=2)(lambda x: matrix @ x, b)
    true = np.linalg.norm(b - matrix @ found.value) / np.linalg.norm(b)
    np.testing.assert_allclose(found.residual, true, rtol=1e-3)
    assert found.residual > 0.1
    assert linear_solve.explain(found).startswith("Not solved")


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
    helped = linear_solve.cg(SIZE, preconditioner=linear_solve.jacobi(SIZE))(
        lambda x: matrix @ x, b
    )
    assert helped.residual < 1e-4 < 1e-2 < plain.residual
    system = linear_solve.System(lambda x: matrix @ x, b)
    inverse, products = linear_solve.jacobi(SIZE)(system)
    assert products == SIZE
    large = np.diag(matrix) > 1e-3 * np.diag(matrix).max()  # smaller ones are floored there
    np.testing.assert_allclose(inverse(np.ones(SIZE))[large], 1 / np.diag(matrix)[large], rtol=1e-9)


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


@pytest.mark.parametrize("loss", HEADS)
@pytest.mark.parametrize(("ridge", "damping"), [(0.1, 0.0), (1e-6, 0.0), (0.0, 0.1)])
def test_woodbury_agrees_with_the_dense_solve(loss, ridge, damping, x64):
    found, exact = with_woodbury_and_densely(head(loss, ridge), damping)
    assert relative_error(found.value, exact.value) < 1e-8
    np.testing.assert_allclose(found.residual, exact.residual, atol=1e-8)


def with_woodbury_and_densely(system, damping=0.0):
    where = {"problem": system.problem, "params": system.params, "context": system.context}

    @jax.jit
    def both(b):
        makers = linear_solve.woodbury, linear_solve.direct
        return [make(damping=damping)(system.product(), b, **where) for make in makers]

    return both(system.b)


def test_woodbury_without_ridge_or_head():
    system = head("softmax", 0.0)
    found, _ = with_woodbury_and_densely(system)
    assert np.isinf(found.residual)
    chex.assert_tree_all_finite(found.value)
    assert linear_solve.explain(found).startswith("Failed")
    headless = dataclasses.replace(system.problem, structure=mm.Structure())
    with pytest.raises(ValueError, match=r"expected a problem with a `structure\.head`"):
        linear_solve.woodbury()(
            lambda x: x, system.b, problem=headless, params=system.params, context=system.context
        )


@pytest.mark.parametrize("bad", [-1, 2.5, "3", True, 2**31])
@pytest.mark.parametrize("name", ["cg", "minres", "neumann"])
def test_bad_arguments_are_named(name, bad):
    with refused("steps", f"expected a whole number, 0 or more, below 2³¹, found {bad!r}"):
        linear_solve.SOLVERS[name](steps=bad)


@pytest.mark.parametrize("name", linear_solve.SOLVERS)
def test_negative_damping_is_refused(name):
    with refused("damping", r"expected a finite number, 0 or more, found -1\.0"):
        linear_solve.SOLVERS[name](damping=-1.0)


def test_explanations_name_the_remedy(x64):
    definite, b, _ = system(SPECTRA["definite"])
    indefinite, _, _ = system(SPECTRA["indefinite"])
    good = linear_solve.explain(linear_solve.cg(20)(lambda x: definite @ x, b))
    assert good.startswith("Solved")
    bad = linear_solve.explain(linear_solve.cg(20)(lambda x: indefinite @ x, b))
    assert "minres" in bad
    assert "Take more steps" in linear_solve.explain(linear_solve.cg(1)(lambda x: definite @ x, b))


@pytest.mark.parametrize("name", ["cg", "direct", "minres", "neumann"])
def test_an_asymmetric_product_is_named(name):
    matrix = jnp.eye(3).at[0, 2].set(0.1)
    found = jax.jit(lambda b: linear_solve.SOLVERS[name]()(lambda x: matrix @ x, b))(jnp.ones(3))
    assert linear_solve.explain(found).startswith("Asymmetric product")
    good = linear_solve.gmres(3)(lambda x: matrix @ x, jnp.ones(3))
    assert good.status == 0
    np.testing.assert_allclose(good.value, np.linalg.solve(matrix, np.ones(3)), atol=1e-6)


def test_a_tolerance_stops_in_time_and_each_task_for_itself():
    """What is reported is what was run; under `vmap` a slow task changes nothing of a quick one."""
    solver = linear_solve.cg(100, tolerance=1e-4)
    spectra = jnp.stack([jnp.ones(40), jnp.geomspace(1e-2, 1, 40)])
    b = jnp.arange(1.0, 41.0)
    together = jax.jit(jax.vmap(lambda a: solver(lambda x: a * x, b)))(spectra)
    alone = [jax.jit(lambda a: solver(lambda x: a * x, b))(a) for a in spectra]
    assert together.iterations.tolist() == [int(one.iterations) for one in alone]
    assert int(together.iterations[0]) == 1
    assert 10 < int(together.iterations[1]) < 80
    # the products of the steps, of the final residual and of the test of symmetry
    assert (together.products - together.iterations).tolist() == [3, 3]
    assert jnp.all(together.residual < 2e-4)
    np.testing.assert_allclose(together.value[0], alone[0].value, rtol=1e-6)
    fixed = linear_solve.cg(20)(lambda x: jnp.array([1.0, 2.0]) * x, jnp.ones(2))
    assert int(fixed.products) == 4 + 3  # never more steps than twice the dimension
    loose = linear_solve.cg(100, tolerance=0.0, absolute_tolerance=10.0)
    assert int(loose(lambda x: spectra[1] * x, b).iterations) < int(together.iterations[1])


@pytest.mark.parametrize("tolerance", [None, 1e-4])
def test_no_message_between_devices_in_any_step(tolerance):
    """Under `shard_map` every device runs its own loop: the compiled program has no collective."""
    mesh = jax.make_mesh((len(jax.devices()),), ("tasks",))
    spec = jax.sharding.PartitionSpec("tasks")
    solve = lambda a: linear_solve.cg(8, tolerance=tolerance)(lambda x: a * x, a).value  # noqa: E731
    spread = jax.shard_map(
        jax.vmap(solve), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    tasks = jnp.ones((2 * len(jax.devices()), 5))
    tasks = jax.device_put(tasks, jax.NamedSharding(mesh, spec))
    text = jax.jit(spread).lower(tasks).compile().as_text()
    for collective in ("all-reduce", "all-gather", "collective-permute", "all-to-all"):
        assert collective not in text
