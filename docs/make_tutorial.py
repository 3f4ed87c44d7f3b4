"""Run a tutorial and write it as a notebook and as a web page, beside its source.

    python docs/make_tutorial.py docs/tutorial.py docs/tutorial.ko.md

Each becomes NAME.ipynb and NAME.html. Where a cell fails, the command ends with the cell's traceback.
"""

import os
import re
import sys
import time
from html import escape
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert.filters import ansi2html, markdown2html
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from report import html  # noqa: E402

COLOURS = {"#1d2733": "--ink", "#ffffff": "--paper", "#6b7785": "--faint", "#d9dfe6": "--line"}  # of pictures.py
LANGUAGES = {"en": "the code of these numbers", "ko": "이 숫자를 계산한 코드"}
CODE = [HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark")]
EXTRA = f"""
{CODE[0]}
@media (prefers-color-scheme: dark) {{ {CODE[1]} }}
body {{ max-width: 52rem; font-size: 17px; line-height: 1.6 }}
h1 {{ font-size: 1.9rem; line-height: 1.25 }} h2 {{ font-size: 1.4rem }}
a {{ color: var(--bar) }} .anchor-link {{ display: none }}
code {{ background: var(--tint); padding: .1em .3em; border-radius: 4px; font-size: .88em }}
pre {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace }}
.highlight, .highlight pre {{ background: none }}
.highlight {{ background: var(--tint); border-radius: 8px; padding: .7rem 1rem; margin: 1rem 0 }}
summary {{ cursor: pointer; color: var(--faint); font-size: .85em }}
figure {{ margin: 1.5rem 0; overflow-x: auto }}
figure svg {{ display: block; width: 100%; min-width: 36rem; height: auto }}
"""


def execute(source: Path) -> dict:
    """Run a text's cells; returns the notebook. Progress bars and log messages are left out of it."""
    notebook = jupytext.read(source)
    os.environ |= {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def page(notebook: dict, title: str, language: str) -> str:
    """Convert the notebook to a web page, light or dark like the reader's system.

    The code of cells that only print a sentence is folded, because it repeats the sentence.
    """
    parts = [f"<style>{EXTRA}</style>"]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(markdown2html(cell.source))
            continue
        code = highlight(cell.source, PythonLexer(), HtmlFormatter())
        folded = "say(" in cell.source and not re.search(r"pictures\.|^from ", cell.source, re.MULTILINE)
        parts.append(f"<details><summary>{LANGUAGES[language]}</summary>{code}</details>" if folded else code)
        parts += map(_output, cell.outputs)
    return html(title, parts).replace("<html lang=en>", f"<html lang={language}>")


def _output(output: dict) -> str:
    """Convert the output of a cell: a picture, a sentence, or plain text."""
    data = output.get("data", {})
    if "image/svg+xml" in data:
        picture = data["image/svg+xml"]
        picture = picture[picture.index("<svg"):]
        for colour, variable in COLOURS.items():
            picture = re.sub(rf'([:"] ?){colour}', rf"\1var({variable})", picture)
        return f"<figure>{picture}</figure>"
    if "text/markdown" in data:
        return markdown2html(data["text/markdown"])
    return f"<pre>{ansi2html(escape(output.get('text') or data.get('text/plain', '')))}</pre>"


def main() -> None:
    for source in map(Path, sys.argv[1:]):
        start, name = time.monotonic(), source.name.rsplit(".", 1)[0]
        notebook = execute(source)
        jupytext.write(notebook, source.with_name(f"{name}.ipynb"))
        title = re.search(r"^# (.+)$", notebook.cells[0].source, re.MULTILINE)[1]
        language = name.partition(".")[2] or "en"
        source.with_name(f"{name}.html").write_text(page(notebook, title, language), "utf-8")
        print(f"{source}: {len(notebook.cells)} cells in {time.monotonic() - start:.0f} s; open {name}.html")


if __name__ == "__main__":
    main()
