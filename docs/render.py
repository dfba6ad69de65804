"""Executes the notebooks and writes them as pages: `docs/notebooks/*.md`, with their pictures beside them.

MkDocs calls `on_pre_build` (`hooks` in mkdocs.yml). A page that is newer than its notebook stays as it is:
remove the folder to execute everything again. A generator that has no hooks gets the same pages from
`python docs/render.py`. Needs the extra `docs`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
SOURCES = DOCS.parent / "notebooks"
PAGES = DOCS / "notebooks"
SECONDS = 300  # for one cell

FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def on_pre_build(config: Any) -> None:
    """The hook of MkDocs: writes all pages that are missing or old."""
    for source in sorted(SOURCES.glob("*.ipynb")):
        page = PAGES / source.with_suffix(".md").name
        if not page.exists() or page.stat().st_mtime < source.stat().st_mtime:
            write(source, page)


def write(source: Path, page: Path) -> None:
    """Executes one notebook, and writes its page."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(source, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(SOURCES)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
    pictures = {"unique_key": source.stem, "output_files_dir": f"{source.stem}_files"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=pictures)
    for name, data in resources["outputs"].items():
        picture = PAGES / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(data)
    page.write_text(text)


def with_mathml(text: str) -> str:
    """Markdown whose formulas are MathML, which browsers show without any script. Code is left alone."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        block, inline = match.groups()
        return str(convert(block, display="block") if block else convert(inline))

    parts = CODE.split(text)  # every second one is code
    return "".join(part if i % 2 else FORMULA.sub(formula, part) for i, part in enumerate(parts))


if __name__ == "__main__":
    on_pre_build(None)
