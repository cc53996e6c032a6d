"""Sentences about trouble in a run, for the report page; docs/how-to/health.md explains them."""

from memmeta.runs.report._judge import Judged

LEFT_OVER = 0.1
"""A relative residual of the linear solver above this is remarked on."""
TROUBLE = {
    "masked": "tasks were not finite and were left out of the averages: lower the rates, raise the "
    "ridge, or look at the data",
    "diverging": "inner loops diverged: use the default inner solver, or a lower inner rate",
    "indefinite": "tasks ended where the inner Hessian is not positive definite, so the implicit "
    "function theorem does not hold there: raise the ridge or the proximal term",
    "refused": "updates were left out because the meta-gradient was far longer than usual: lower "
    "the outer rate",
}


def remarks(run: Judged) -> list[str]:
    """Sentences about everything unusual in a run, or one that says that nothing was.

    Args:
        run: the run.

    Returns:
        Sentences without their final full stop.
    """
    if not run.lines:
        return ["no log point yet"]
    found = []
    for name, words in TROUBLE.items():
        count = sum(line.get(name) or 0 for line in run.lines)
        if count:
            found.append(f"{count} {words}")
    last = run.lines[-1]
    residual = last.get("linear_residual") or 0.0
    if residual > LEFT_OVER:
        found.append(
            f"at the end the linear solver left {100 * residual:.0f} % of its right-hand side: "
            "give it more steps, or the problem a ridge"
        )
    found += _fallen(run)
    if run.step is None:
        found.append("no checkpoint yet, so there are no test figures")
    solved = ", and every linear system was solved" if last.get("linear_iterations") else ""
    return found or [f"nothing unusual: every task was finite{solved}"]


def _fallen(run: Judged) -> list[str]:
    """A remark if the last validation accuracy is clearly below the best one, otherwise none."""
    checked = [line for line in run.lines if line.get("validation_accuracy") is not None]
    if not checked:
        return []
    best = max(checked, key=lambda line: line["validation_accuracy"])
    last = checked[-1]
    margin = best["validation_interval"] + last["validation_interval"]
    if last["validation_accuracy"] >= best["validation_accuracy"] - margin:
        return []
    return [
        f"validation accuracy fell from {100 * best['validation_accuracy']:.1f} % at meta-step "
        f"{best['step']} to {100 * last['validation_accuracy']:.1f} %"
    ]
