"""An experiment runs from its command to its table, JSON file and picture; fits are right."""

import json

import pytest

from benchmarks.convergence import claims, fits


def test_quick_run_of_one_experiment(tmp_path, capsys):
    arguments = ["--quick", "--only", "memory", "--out", str(tmp_path)]
    assert claims.main(arguments), capsys.readouterr().out
    found = json.loads((tmp_path / "convergence.json").read_text())
    assert set(found) == {"memory"}
    assert (tmp_path / "convergence.png").stat().st_size > 10_000
    assert "holds" in capsys.readouterr().out


def test_fits_find_known_exponents():
    x = fits.np.arange(1.0, 50.0)
    power = fits.np.stack([3 * x**-1.5, 5 * x**-1.5])
    assert fits.slope(x, power).value == pytest.approx(-1.5)
    decay = fits.np.stack([fits.np.exp(-0.3 * x)] * 2)
    assert fits.geometric(x, decay, 1e-3, 0.5) == pytest.approx([0.3, 0.3])
