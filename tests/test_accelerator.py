"""Measuring on an accelerator: a part that fails costs nothing else, and aims are read right."""

import importlib.util
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accelerator import convolutions
from benchmarks.accelerator.__main__ import FULL_PRECISION, PARTS, environment, main, missing, run
from benchmarks.accelerator.report import aims, picture, table

CHIP = {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3"}


def results(quick=False, machine=CHIP, **parts):
    each = {name: {"rows": rows, "said": "", "seconds": 1.0} for name, rows in parts.items()}
    return {"quick": quick, "machine": machine, "missing": [], "parts": each}


def verdicts(found):
    return {line["what"]: line[""] for line in aims(found)}


def memory(method, steps, peak):
    row = {"workload": "a", "method": method, "T": steps, "compiled MB": 1.0}
    return row | {"peak MB": peak, "above inputs MB": peak}


FIGURES = {
    "memory": [memory("memory_reduced", 1, 50.0), memory("memory_reduced", 1000, 50.1)],
    "products": [{"precision": "bfloat16", "TFLOP/s": 700.0, "published": 989.4}],
    "precision": [{"precision": "bfloat16", "TFLOP/s": 300.0}],
    "convolutions": [{"block": "all", "TFLOP/s": 350.0}],
    "chunks": [
        {"workload": "a", "method": "maml", "chunk": chunk, "s": seconds}
        for chunk, seconds in (("auto", 0.2), (1, 0.1))
    ],
    "conformance": [{"": "holds"}, {"": "FAILED", "said": "no memory"}],
}


def test_aims_are_read_from_the_figures():
    found = verdicts(results(**FIGURES))
    assert found["memory_reduced: memory at T = 1000 over T = 1"] == "holds"
    assert found["imaml: memory at T = 1000 over T = 1"] == "unmeasured"
    assert found["b84, bfloat16, over the published peak"] == "MISSED"  # 300 of 989
    assert found['a, maml: "auto" over the fastest of 2 chunks'] == "MISSED"
    assert found["estimators within float32 of an answer from elsewhere"] == "MISSED"


@pytest.mark.parametrize(("quick", "platform"), [(True, "gpu"), (False, "cpu")])
def test_no_aim_of_a_chip_is_met_without_one(quick, platform):
    found = verdicts(results(quick, CHIP | {"platform": platform}, **FIGURES))
    assert set(found.values()) == {"unmeasured", "MISSED"}
    assert found["estimators within float32 of an answer from elsewhere"] == "MISSED"


def test_peers_count_where_they_found_the_same():
    def row(who, same, ratio):
        return {"case": "a:maml:5", "who": who, "same": same, "over ours": ratio}

    what = "a:maml:5, float32: PyTorch's loop over tasks, over ours"
    rows = [row("PyTorch", "yes", 4.0), row("PyTorch, vmap over tasks", "yes", 1.0)]
    assert verdicts(results(peers=rows))[what] == "holds"
    assert verdicts(results(peers=[row("PyTorch", "NO (1.0)", 4.0)]))[what] == "unmeasured"


def test_the_table_and_the_picture_take_what_there_is(tmp_path):
    found = results(**FIGURES, peers=[], scaling=[])
    found["parts"]["speed"] = {"rows": [], "said": "stopped after 90 s", "seconds": 90.0}
    text = table(found, {name: part.title for name, part in PARTS.items()})
    assert "stopped after 90 s" in text
    assert "NVIDIA H100" in text
    picture(found, tmp_path / "accelerator.png")
    assert (tmp_path / "accelerator.png").stat().st_size > 10_000


def test_rows_of_a_process_that_fails_are_kept(tmp_path):
    code = "import os; print('{\"s\": 1}', flush=True); os.kill(os.getpid(), 9)"
    found = run(["-c", code], 60, dict(os.environ), tmp_path / "log")
    assert found["rows"] == [{"s": 1}]
    assert found["said"].startswith("ended with -9")
    found = run(["-c", "raise SystemExit('no memory')"], 60, dict(os.environ), tmp_path / "log")
    assert found["said"] == "ended with 1: no memory"


def test_a_part_without_its_packages_is_left_out(tmp_path, monkeypatch, capsys):
    spec = importlib.util.find_spec
    absent = ("torch", "optax")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in absent else spec(n))
    assert missing().keys() >= set(absent)
    main(["--quick", "--only", "peers", "speed", "--out", str(tmp_path)])
    parts = json.loads((tmp_path / "accelerator.json").read_text())["parts"]
    assert parts["peers"]["said"] == "left out: optax and torch"
    assert parts["speed"] == {"rows": [], "said": "left out: optax", "seconds": 0.0}
    assert "missing: torch (peers: all)" in capsys.readouterr().out


def test_processes_take_memory_as_they_need_it_and_see_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    found = environment(FULL_PRECISION, tmp_path)
    assert found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert found["JAX_PLATFORMS"] == "cuda,cpu"
    assert found["JAX_DEFAULT_MATMUL_PRECISION"] == "highest"


def test_forms_of_a_convolution_are_one_sum():
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (2, 3, 6, 6, 2))
    cotangents = jax.random.normal(keys[1], (2, 3, 6, 6, 4))
    gradient = convolutions.kernel_gradient
    found = convolutions.together(gradient)(images, cotangents)
    in_order = convolutions.in_order(gradient)(images, cotangents)
    np.testing.assert_allclose(found, in_order, atol=1e-4)
    one = convolutions.kernel_gradient_as_convolution(images[0], cotangents[0])
    np.testing.assert_allclose(found[0], one, atol=1e-4)
    kernel = jax.random.normal(keys[0], (3, 3, 2, 4))
    (expected,) = jax.vjp(lambda x: convolutions.convolve(x, kernel), images[0])[1](cotangents[0])
    found = convolutions.image_gradient(cotangents[0], kernel)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert jnp.isfinite(found).all()


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    parts = ["products", "memory", "precision", "chunks", "convolutions", "messages, simulated"]
    main(["--quick", "--out", str(tmp_path), "--only", *parts])
    found = json.loads((tmp_path / "accelerator.json").read_text())["parts"]
    assert list(found) == parts
    assert {name: each["said"] for name, each in found.items()} == dict.fromkeys(parts, "")
    assert [row["peak MB"] for row in found["memory"]["rows"]] == [None, None]
    assert all(row["s"] > 0 for row in found["precision"]["rows"] + found["chunks"]["rows"])
    assert found["messages, simulated"]["rows"][0]["messages"] == "all-reduce"
    assert (tmp_path / "accelerator.md").exists()
