"""Docs: a page for each notebook, as it is committed with its outputs; nothing is run."""

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the notebooks into the navigation, before the API."""
    notebooks = [{title(path): f"notebooks/{path.stem}.md"} for path in found()]
    if notebooks:
        before = next(i for i, entry in enumerate(config.nav) if "API" in entry)
        config.nav.insert(before, {"Notebooks": notebooks})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages themselves."""
    for path in found():
        page = File.generated(config, f"notebooks/{path.stem}.md", content=as_markdown(path))
        files.append(page)
    return files


def found() -> list[Path]:
    """All notebooks, in their order."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    """A notebook's cells."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def title(path: Path) -> str:
    """The first heading of a notebook."""
    first = "".join(cells(path)[0]["source"])
    return first.splitlines()[0].lstrip("# ")


def as_markdown(path: Path) -> str:
    """A notebook as a page."""
    parts = []
    for cell in cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source.strip():
            parts.append(f"```python\n{source}\n```")
            shown = "\n\n".join(filter(None, map(output, cell["outputs"])))
            if shown:
                parts.append(f'<div class="notebook-output" markdown>\n\n{shown}\n\n</div>')
    return "\n\n".join(parts) + "\n"


def output(found: dict[str, Any]) -> str:
    """One output of a cell: a picture, or text."""
    data = found.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f"![output](data:image/png;base64,{picture})"
    text = "".join(found.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
