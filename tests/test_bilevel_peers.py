"""Other libraries beside the recipes: a made-up clone, BOAT where installed, what is missing."""

import argparse
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks.bilevel import benchopt_solvers, peers, problems
from benchmarks.bilevel.recipes import RATES
from benchmarks.bilevel.runs import run_of

SOLVER = '''
import jax
import jax.numpy as jnp


class Solver:
    """SOBA with the interface of the clone's solvers, and rates that decay by themselves."""

    @classmethod
    def get_instance(cls, batch_size):
        made = cls()
        made.rows = batch_size
        return made

    def set_objective(self, inner, outer, inner_samples, outer_samples, phi, theta):
        self.inner, self.outer, self.start = inner, outer, (phi, theta)
        assert inner_samples == outer_samples == self.rows

    def init(self):
        phi, theta = self.start
        rates = {"i_step": 0, "constants": jnp.full(2, 7.0), "exponents": jnp.full(2, 0.5)}
        return {"inner_var": phi, "outer_var": theta, "v": jnp.zeros_like(phi), "state_lr": rates}

    def one_epoch(self, carry, steps):
        for _ in range(steps):
            phi, theta, v, rates = (
                carry[name] for name in ("inner_var", "outer_var", "v", "state_lr")
            )
            decay = jnp.float32(rates["i_step"] + 1) ** rates["exponents"]
            inner, outer = rates["constants"] / decay
            slope = lambda phi, theta: jax.grad(self.inner)(phi, theta, 0, self.rows)
            d_phi, pull_back = jax.vjp(slope, phi, theta)
            product, mixed = pull_back(v)
            by_phi, by_theta = jax.grad(self.outer, (0, 1))(phi, theta, 0, self.rows)
            carry = {
                "inner_var": phi - inner * d_phi,
                "v": v - inner * (product + by_phi),
                "outer_var": theta - outer * (by_theta + mixed),
                "state_lr": rates | {"i_step": rates["i_step"] + 1},
            }
        return carry
'''


def asked(folder: Path | None = None, boat: bool = False) -> argparse.Namespace:
    return argparse.Namespace(
        quick=True, benchmark_bilevel=folder, boat=boat, repeats=1, cpu_time=False
    )


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like one, with SOBA alone, and something by the name of benchopt."""
    for name in ("solvers", "benchmark_utils"):
        (tmp_path / name).mkdir()
    (tmp_path / "solvers" / "soba.py").write_text(SOLVER)
    (tmp_path / "benchopt.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("solvers", "solvers.soba"):
        sys.modules.pop(name, None)


def test_what_is_missing_is_said_in_one_line(tmp_path, clone, capsys, monkeypatch):
    assert peers.pairs("quadratic", asked()) == {}
    assert capsys.readouterr().out == ""
    for module in (peers, benchopt_solvers):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert peers.pairs("quadratic", asked(tmp_path / "empty", boat=True)) == {}
    assert peers.pairs("quadratic", asked(clone)) == {}
    first, boat, second = capsys.readouterr().out.splitlines()
    assert "git clone https://github.com/benchopt/benchmark_bilevel" in first
    assert "pip install --no-deps boat-torch" in boat
    assert "pip install benchopt" in second


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_a_solver_of_a_clone_goes_through_our_numbers(clone, name):
    example, pairs = problems.PROBLEMS[name](128), peers.pairs(name, asked(clone))
    assert len(pairs) == 4
    row = peers.same_step("SOBA", pairs["SOBA, benchopt"], example, RATES[name])
    assert row["same"] == "yes"
    assert row["θ apart"] < 1e-4


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_boat_goes_through_our_numbers(name):
    pytest.importorskip("boat_torch")
    example = problems.PROBLEMS[name](512)
    for peer, pair in peers.pairs(name, asked(boat=True)).items():
        assert peers.same_step(peer, pair, example, RATES[name])["same"] == "yes"


def test_a_peer_is_timed_beside_ours(clone):
    example, rates = problems.logistic(64), RATES["logistic"]
    (name, pair), *_ = peers.pairs("logistic", asked(clone)).items()
    ours = partial(run_of, example=example, rates=rates, rows=64)
    runs = {name: pair.peer(example, rates, 64), pair.ours: ours(pair.ours)}
    ordered = partial(ours, view=problems.in_order(64))
    row = peers.beside_peer(name, pair, runs, ordered, asked(clone))
    assert row["ours with"] == "no draws"
    assert min(row["peer, µs"], row["ours, µs"], row["µs"]) > 0
