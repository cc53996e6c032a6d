"""Fixed points of the inner solver's step: decay, projections and proximal steps in the optimiser.

All of these `implicit` gets wrong: it differentiates ∇_φ g = 0, which they do not solve.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from assertions import refused, relative_error

import memmeta as mm
from memmeta.linear_solve import gmres

CURVATURE = np.array([1.0, 3.0])
DECAY = 0.5


def problem(inner_loss, start):
    return mm.Problem(
        embed=lambda theta, batch: (theta, batch),
        inner_loss=lambda phi, c: inner_loss(phi, c[0]),
        outer_loss=lambda phi, c: (0.5 * jnp.sum((phi - c[1]) ** 2), {}),
        init=lambda theta: start * jnp.ones_like(theta),
    )


def quadratic(phi, theta):
    return 0.5 * jnp.sum(jnp.asarray(CURVATURE, phi.dtype) * (phi - theta) ** 2)


DECAYING = {
    "sgd": optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(0.2)),
    "momentum": optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(0.1, momentum=0.5)),
    "adam": optax.chain(optax.add_decayed_weights(DECAY), optax.adam(0.01)),
}
CASES = {name: (quadratic, 0.0, optimizer) for name, optimizer in DECAYING.items()} | {
    "projection": (
        lambda phi, theta: 0.5 * jnp.sum((phi - theta) ** 2),
        1.0,
        optax.chain(optax.sgd(0.5), optax.keep_params_nonnegative()),
    )
}


def exact(name, theta):
    """φ* in closed form, and its Jacobian by θ, which is diagonal."""
    if name == "projection":  # min ½‖φ − θ‖² over φ ≥ 0
        return np.maximum(theta, 0), np.where(theta > 0, 1.0, 0.0)
    slope = CURVATURE / (CURVATURE + DECAY)
    return slope * theta, slope


@pytest.mark.parametrize("name", CASES)
def test_against_the_closed_form(name, x64):
    loss, start, optimizer = CASES[name]
    inner = mm.InnerLoop(optimizer, steps=3000 if name == "adam" else 300)
    theta, target = jnp.array([1.0, -2.0]), jnp.array([0.3, -0.2])
    phi, slope = exact(name, np.asarray(theta))
    estimator = mm.hypergradient.fixed_point()
    step = mm.make_meta_step(problem(loss, start), inner, estimator, optax.sgd(0.1))
    gradient, metrics = jax.jit(step.gradient)(step.init(theta), target[None])
    assert relative_error(gradient, slope * (phi - target)) < 1e-5
    report = metrics.report
    assert report.inner_gradient_norm < 1e-6
    assert report.linear_residual < 1e-8
    assert report.contraction < 1
    solution = mm.implicit_solution(loss, inner, of="fixed_point")
    for mode in (jax.jacrev, jax.jacfwd):
        jacobian = jax.jit(mode(solution, argnums=1))(start * jnp.ones(2), theta)
        np.testing.assert_allclose(jacobian, np.diag(slope), atol=1e-5)


@pytest.mark.parametrize(
    "solver",
    [
        mm.inner.accelerated(),
        optax.inject_hyperparams(optax.sgd)(0.1),
        optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.2, 100)),
    ],
    ids=["curvature and count", "rate", "scheduled rate"],
)
def test_rates_and_counts_in_the_state_are_constants(x64, solver):
    """Before the loop has come to rest they would make the linear system singular."""
    theta, target = jnp.array([1.0, -2.0]), jnp.array([0.3, -0.2])
    found = []
    for estimator in (mm.hypergradient.fixed_point(), mm.hypergradient.implicit()):
        step = mm.make_meta_step(
            problem(quadratic, 0.0), mm.InnerLoop(solver, steps=5), estimator, optax.sgd(0.1)
        )
        gradient, metrics = jax.jit(step.gradient)(step.init(theta), target[None])
        assert metrics.report.linear_residual < 1e-12
        found.append(gradient)
    np.testing.assert_allclose(*found, rtol=1e-10)


def test_second_derivatives(x64):
    loss = lambda phi, theta: 0.5 * jnp.sum((phi - theta**2) ** 2)  # noqa: E731
    optimizer = optax.chain(optax.add_decayed_weights(1.0), optax.sgd(0.2))
    solution = mm.implicit_solution(
        loss, mm.InnerLoop(optimizer, steps=100), gmres(2), of="fixed_point"
    )
    first = jax.jacfwd(lambda c: solution(jnp.zeros(2), c).sum())
    for mode in (jax.jacfwd, jax.jacrev):
        found = jax.jit(mode(first))(jnp.array([1.0, 2.0]))
        np.testing.assert_allclose(found, np.eye(2), atol=1e-6)


def test_what_is_no_contraction_says_so():
    inner = mm.InnerLoop(optax.sgd(0.9), steps=3)  # the second curvature is 3: |1 − 2.7| > 1
    estimator = mm.hypergradient.fixed_point()
    step = mm.make_meta_step(problem(quadratic, 0.0), inner, estimator, optax.sgd(0.1))
    metrics = jax.jit(step.gradient)(step.init(jnp.ones(2)), jnp.ones((1, 2)))[1]
    np.testing.assert_allclose(metrics.report.contraction, 1.7, atol=0.05)
    assert "no contraction" in mm.explain(metrics)


def test_another_equation_is_refused():
    with refused("of", "expected one of 'minimum', 'fixed_point', found 'root'"):
        mm.implicit_solution(quadratic, of="root")


def proximal_step(rate):
    """φ ← S(φ − rate · Xᵀ(Xφ − y)/n, rate · e^λ), S the soft threshold: ISTA."""

    def update(problem, params, state, context, step, key):
        (_, _, penalty), gradient = context, jax.grad(problem.inner_loss)(params, context)
        moved, threshold = params - rate * gradient, rate * jnp.exp(penalty)
        shrunk = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - threshold, 0)
        return shrunk, state, jnp.linalg.norm(gradient)

    return mm.inner.InnerSolver(lambda problem, params, context: (), update)


def test_lasso_with_one_penalty_a_feature(x64):
    """scikit-learn's diabetes data: against the closed form on the support of its own solution."""
    datasets = pytest.importorskip("sklearn.datasets")
    models = pytest.importorskip("sklearn.linear_model")
    inputs, targets = datasets.load_diabetes(return_X_y=True)
    inputs, targets = inputs / inputs.std(0), (targets - targets.mean()) / targets.std()
    (train, held_out), (y, held_y) = np.split(inputs, [300]), np.split(targets, [300])
    n, penalties = len(train), np.log(np.geomspace(0.02, 0.08, 10))

    def inner_loss(phi, context):
        return 0.5 * jnp.mean((context[0] @ phi - context[1]) ** 2)

    rate = 1 / np.linalg.eigvalsh(train.T @ train / n)[-1]
    inner = mm.InnerLoop(proximal_step(float(rate)), steps=5000)
    solution = mm.implicit_solution(inner_loss, inner, gmres(10), of="fixed_point")

    @jax.jit
    @jax.value_and_grad
    def held_out_loss(penalties):
        phi = solution(jnp.zeros(10), (jnp.asarray(train), jnp.asarray(y), penalties))
        return 0.5 * jnp.mean((held_out @ phi - held_y) ** 2)

    loss, found = held_out_loss(jnp.asarray(penalties))
    weights = np.exp(penalties)  # one penalty a feature is a Lasso on scaled features
    lasso = models.Lasso(alpha=1.0, fit_intercept=False, tol=1e-12, max_iter=100_000)
    phi = lasso.fit(train / weights, y).coef_ / weights
    support = np.flatnonzero(phi)
    assert 3 <= len(support) < 10
    np.testing.assert_allclose(loss, 0.5 * np.mean((held_out @ phi - held_y) ** 2), rtol=1e-8)
    slope = held_out.T @ (held_out @ phi - held_y) / len(held_y)
    gram = train[:, support].T @ train[:, support] / n
    exact = np.zeros(10)
    exact[support] = (
        -weights[support] * np.sign(phi[support]) * np.linalg.solve(gram, slope[support])
    )
    np.testing.assert_allclose(found, exact, atol=1e-8)
