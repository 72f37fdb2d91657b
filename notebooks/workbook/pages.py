"""Pages: an executed notebook as an HTML file that opens without a network."""
import html
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbformat.v4 import new_markdown_cell
from traitlets.config import Config

from workbook import files, paths

TEMPLATES = Path(__file__).parent / "template"
LOG_LINES = 60
HEADLINE = "headline"
"""Tag of the cell whose output opens the page, right below the title, wherever it stands in the notebook."""
FAILURE = "failure"
"""Tag of the cell that says why a run failed."""
PAPERMILL_ERROR = "papermill-error-cell-tag"
"""Tag of the cells that papermill adds to a failed notebook: one at the top, whose link to the other a page does not have, and that one."""


def write(notebook: Path, page: Path, title: str, nav: list[tuple[str, str]], *, code: bool = True) -> None:
    """Export a notebook.

    Args:
        nav: (name, relative address) of each neighbour; an empty address is the page itself.
        code: show the code cells; cells tagged `hide-input` never show theirs.
    """
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = _headline_first([_without_scraps(cell) for cell in nb.cells if not (_is(cell, PAPERMILL_ERROR) and 'href="' in cell.source)])
    nb.metadata.title = title
    nb.metadata.pop("widgets", None)
    exporter = HTMLExporter(config=Config({
        "HTMLExporter": {"exclude_input": not code, "exclude_anchor_links": True, "embed_images": True},
        "TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"hide-input", "parameters", "injected-parameters"}},
    }), extra_template_basedirs=[str(TEMPLATES)], template_name="goldbook")
    body, _ = exporter.from_notebook_node(nb, resources={"goldbook_nav": nav, "metadata": {"name": title, "path": str(notebook.parent)}})
    files.write_text(page, body)


def link(page: Path, name: str, address: str) -> None:
    """Add a neighbour to the links of a page that was made before it, unless it has it."""
    text = page.read_text()
    links, end, rest = text.partition("</nav>")
    added = f'<a href="{html.escape(address)}">{html.escape(name)}</a>'
    if end and added not in links:
        files.write_text(page, links + added + end + rest)


def add_failure(notebook: Path, sentence: str, log: Path) -> None:
    """Put the cause of a failure at the top of an executed notebook, with the end of the engine's log folded away, in place of what
    was said of it before.

    A notebook that never came to be written is made from its source, so that there is a page to read.
    """
    source = notebook if notebook.exists() else paths.NOTEBOOKS / notebook.name
    nb = nbformat.read(source, as_version=4)
    nb.cells = [cell for cell in nb.cells if not _is(cell, FAILURE)]
    nb.cells.insert(0, new_markdown_cell(f'<div style="border-left:.4em solid #82071e;padding:.6em 1.2em;background:#fff0ee;color:#1f2328">'
                                         f'<b>✗ This run failed.</b> {html.escape(sentence)}{_tail(log)}</div>', metadata={"tags": [FAILURE]}))
    nbformat.write(nb, notebook)


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    # One line of HTML: a blank line would end the block that Markdown passes through.
    text = "&#10;".join(html.escape(line) or "&nbsp;" for line in lines)
    return f"<details><summary>last {f'{len(lines)} lines' if len(lines) > 1 else 'line'} of engine.log</summary><pre>{text}</pre></details>"


def _without_scraps(cell):
    if cell.cell_type == "code":
        cell.outputs = [o for o in cell.outputs if not any(k.startswith("application/scrapbook") for k in o.get("data", {}))]
    return cell


def _headline_first(cells: list) -> list:
    headline = [c for c in cells if _is(c, HEADLINE)]
    rest = [c for c in cells if not _is(c, HEADLINE)]
    # Behind the title, and behind a failure's banner where there is one.
    place = next((i + 1 for i, c in enumerate(rest) if c.cell_type == "markdown" and c.source.startswith("# ")), 0)
    return rest[:place] + headline + rest[place:]


def _is(cell, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])
