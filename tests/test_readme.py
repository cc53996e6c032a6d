"""The README's example runs as printed."""

import contextlib
import io
import pathlib
import re

import jax

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_example_runs_as_printed():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    output = io.StringIO()
    with contextlib.redirect_stdout(output), jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "README.md", "exec"), {})
    loss, accuracy = re.search(r"loss (\S+), accuracy (\S+)", output.getvalue()).groups()
    assert float(loss) < 1.6
    assert float(accuracy) > 0.4
    assert "tasks masked 0" in output.getvalue()
