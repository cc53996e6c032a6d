"""The notebooks: committed with the outputs of one run from top to bottom, and every cell runs."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|usr|work|Users|mnt|opt|var)/|[A-Z]:\\\\")
PICTURES, LARGEST = 150_000, 3_000_000  # bytes of one picture, of all notebooks

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    """Cells of code, after a check of the whole notebook's form."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_they_are_there_and_of_moderate_size():
    assert NOTEBOOKS
    assert sum(path.stat().st_size for path in NOTEBOOKS) < LARGEST


@each
def test_it_was_run_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)


@each
def test_its_outputs_are_fit_to_be_read(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            data = output.get("data", {})
            text = output.get("text", "") + data.get("text/plain", "") + data.get("text/html", "")
            assert not MACHINE.search(text), text
            assert "Warning" not in text
            assert len(base64.b64decode(data.get("image/png", ""))) < PICTURES


def test_they_carry_nothing_of_a_machine():
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        assert set(notebook.metadata) == {"kernelspec", "language_info"}
        assert set(notebook.metadata.kernelspec) == {"display_name", "language", "name"}
        assert not MACHINE.search(path.read_text(encoding="utf-8"))
        assert all(not cell.metadata for cell in notebook.cells)


def test_they_are_formatted():
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "notebooks"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@each
def test_every_cell_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources)
    # the other tests simulate many devices
    client.execute(env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"})
    assert any(cell.get("outputs") for cell in notebook.cells)
