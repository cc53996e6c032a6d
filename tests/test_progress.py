"""What a person sees of a run: plain lines in a file, a bar in a terminal and in a notebook."""

import os
import subprocess
import sys

import nbformat
from nbclient import NotebookClient

from memmeta.runs import shown

FIRST = {"step": 20, "loss": 0.5, "accuracy": 0.9, "tasks_per_second": 31.0, "masked": 0}
TROUBLE = "2 of 32 tasks left out: 2 whose data are not finite (look at the tasks)"
JUDGES = {"validation_accuracy": 0.8, "validation_interval": 0.02}
LAST = {**FIRST, "step": 40, "masked": 2, "trouble": f"{TROUBLE}.", **JUDGES}
SAID = "query loss 0.500, accuracy 90.0 %, 31 tasks/s"
JUDGED = f"{SAID}, {TROUBLE}, validation 80.0 ± 2.0 %"
PROGRAM = f"""
from memmeta.runs import shown
with shown(40) as show:
    show({FIRST!r})
    show({LAST!r})
"""


def printed(capsys):
    """All that a run of two log points prints."""
    with shown(40) as show:
        show(FIRST)
        show(LAST)
    return capsys.readouterr().out


def test_a_log_file_gets_one_plain_line_a_log_point(capsys):
    assert printed(capsys).splitlines() == [
        f"meta-step 20/40: {SAID}",
        f"meta-step 40/40: {JUDGED}",
    ]


def test_a_terminal_gets_a_bar_and_keeps_what_was_judged():
    # rich reads these when it is imported: a pipe then passes for a terminal of that width
    terminal = {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env=os.environ | terminal, capture_output=True, text=True, check=True
    )
    assert "40/40" in done.stdout
    assert f"meta-step 40: {JUDGED}" in done.stdout


def test_a_notebook_gets_one_output_that_is_redrawn(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PROGRAM)])
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    (output,) = notebook.cells[0].outputs
    assert output.data["text/html"] == (
        f'<progress value="40" max="40"></progress> 40/40 {JUDGED}<br>meta-step 40: {JUDGED}'
    )
    assert output.data["text/plain"].splitlines() == [
        f"meta-step 40/40: {JUDGED}",
        f"meta-step 40: {JUDGED}",
    ]
