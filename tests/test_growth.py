"""How cost grows: exponents of laws that are known, and what is extrapolated from them."""

import pytest

from benchmarks.cost.growth import COSTS, LIMITS, first_break, law, laws


def rows(exponent, cost="s", spread=1.0, method="maml", axis="tasks"):
    """Costs of 1e-3 size^exponent; all others stay as they are."""
    found = []
    for size in (1, 2, 4, 8):
        row = dict.fromkeys(COSTS, 1e-3) | {"axis": axis, "method": method, "size": size}
        row[cost] = 1e-3 * size**exponent
        found.append(row | {"from": row["s"] / spread, "to": row["s"] * spread})
    return found


@pytest.mark.parametrize("cost", COSTS)
def test_a_power_law_is_found(cost):
    assert law(rows(1.5, cost), cost) == pytest.approx((1.5, 1.5, 1.5))


def test_only_the_larger_end_counts():
    found = rows(1.0)
    found[0] |= {"s": 1.0, "from": 1.0, "to": 1.0}
    assert law(found, "s") == pytest.approx((1.0, 1.0, 1.0))


def test_the_spread_of_seconds_widens_the_interval():
    slope, least, most = law(rows(1.0, spread=2**0.25), "s")
    assert (slope, least, most) == pytest.approx((1.0, 0.5, 1.5))


def test_what_breaks_first_is_extrapolated_from_what_grows_for_certain():
    flat = (0.0, 0.0, 0.0)
    grows = dict.fromkeys(COSTS, flat) | {"s": (1.0, 0.9, 1.1), "rounding": (2.0, -1.0, 9.0)}
    last = rows(1.0)[-1]
    assert first_break([last], grows) == "none up to 100 times"
    near = last | {"s": LIMITS["s"] / 10}
    assert first_break([near], grows) == "time, at 8e+01"
    assert first_break([near], dict.fromkeys(COSTS, flat)) == "none up to 100 times"
    broken = last | {"MB": LIMITS["MB"]}
    assert first_break([broken], grows) == "memory, at 8"


def test_a_line_for_each_axis_and_method():
    lines = laws(rows(1.0) + rows(2.0, "MB", axis="devices"))
    assert [line["size"] for line in lines] == ["tasks", "devices"]
    assert lines[0]["time"] == "1.00 (1.00 to 1.00)"
    assert lines[1]["memory"] == "2.00 (2.00 to 2.00)"
    assert lines[1]["breaks first"] == ""
