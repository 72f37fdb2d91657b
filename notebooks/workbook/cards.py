"""HTML fragments of the report: the status, the five answers, a card a run. All text is escaped."""
import html
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd

from workbook import metrics, schemas

COLOURS = {"PASSED": "#1a7f37", "IMPROVED": "#0969da", "REGRESSED": "#cf222e", "INVALID": "#82071e",
           "INCONCLUSIVE": "#9a6700", "NO_GOLDEN": "#57606a", "SKIPPED": "#6e7781", "NOT_RUN": "#6e7781"}
MARKS = {"PASSED": "✓", "IMPROVED": "▲", "REGRESSED": "▼", "INVALID": "✗", "INCONCLUSIVE": "?", "NO_GOLDEN": "○",
         "SKIPPED": "–", "NOT_RUN": "–"}

LONG_WORD = 60
"""A word of more characters is broken where the table ends: a model that loops may have written one of thousands."""
SENTENCE = 40
"""A text of more characters is read in lines: its column keeps this width, and is not squeezed to a word a line by many others."""


def show(*fragments: str) -> None:
    """Display HTML in the running notebook."""
    from IPython.display import HTML, display
    display(HTML("".join(fragments)))


def badge(status: str) -> str:
    """A status as a coloured label; the mark says the same without the colour."""
    return (f'<span style="background:{COLOURS[status]};color:#fff;border-radius:1em;padding:.2em .8em;font-weight:600;'
            f'white-space:nowrap">{MARKS[status]} {html.escape(status.replace("_", " "))}</span>')


def verdict(status: str, sentence: str, questions: Iterable[dict[str, str]] = ()) -> str:
    """The first screen: the status, its sentence, and the questions with their answers; one that is the sentence, as that of a missing golden, is not said again."""
    rows = "".join(f'<tr><th style="text-align:left;vertical-align:top;white-space:nowrap;padding:.4em 1.2em .4em 0">{html.escape(q["question"])}</th>'
                   f'<td style="text-align:left;padding:.4em 0">{_lines("nothing to compare with, as said above" if status == "NO_GOLDEN" and q["answer"] == sentence else q["answer"])}</td></tr>' for q in questions)
    table = f'<table class="answers" style="border-collapse:collapse;margin-top:1em;font-size:1em">{rows}</table>' if rows else ""
    return (f'<div style="border-left:.4em solid {COLOURS[status]};padding:.6em 1.2em;background:#f6f8fa;color:#1f2328;max-width:62em">'
            f'<p style="font-size:1.15em;margin:.2em 0">{badge(status)}&nbsp; {html.escape(sentence)}</p>{table}</div>')


def _lines(answer: str) -> str:
    """An answer, each of the parts that semicolons join on a line of its own, but for those in brackets."""
    lines, depth = [""], 0
    for part in re.split("(; |[()])", answer):
        depth = max(0, depth + {"(": 1, ")": -1}.get(part, 0))
        if part == "; " and not depth:
            lines.append("")
        else:
            lines[-1] += part
    return "".join(f'<div style="padding-left:1em;text-indent:-1em">{html.escape(line)}</div>' for line in lines)


def run_card(result: dict[str, Any], pages: list[str], links: dict[str, str]) -> str:
    """One run on the summary: status, sentence, five answers, and links to the pages that exist.

    Args:
        pages: all pages a complete run has.
        links: address of those that are there.
    """
    parts = [f'<a href="{html.escape(links[p])}">{html.escape(p)}</a>' if p in links else f'<span style="color:#6e7781">{html.escape(p)} missing</span>' for p in pages]
    # JupyterLab and plain papermill leave the results here, and what was run where it was.
    below = " · ".join(parts) if links else "no pages: taken in JupyterLab or by plain papermill" if result["metrics"] else ""
    below = "" if result["status"] in ("SKIPPED", "NOT_RUN") or not below else f'<p style="margin:.6em 0 0">{below}</p>'
    return (f'<section id="{html.escape(result["run"])}" style="margin:1.6em 0"><h3 style="margin:.2em 0;line-height:1.3">{html.escape(result["run"])}'
            f'<span style="font-weight:400;color:#57606a">&ensp;{html.escape(result["title"])}</span></h3>'
            f'{verdict(result["status"], schemas.brief(result), result["questions"])}{below}</section>')


def bare_page(title: str, note: str, body: str) -> str:
    """A whole page around fragments, for where no notebook makes one."""
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>'
            f'<body style="font-family:sans-serif;line-height:1.6;max-width:64em;margin:2em auto;padding:0 1.5em;background:#fff;color:#1f2328">'
            f'<h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>{body}</body></html>\n')


def table(frame: pd.DataFrame, caption: str = "") -> str:
    """A data frame as a table: numbers right-aligned, thousands separated, three significant digits or so; without a head where the columns have no names."""
    def shown(value: Any) -> str:
        if value is None or value is pd.NA or isinstance(value, float):
            return metrics.number(None if value is pd.NA else value)
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

    def wrapped(text: str) -> str:
        if any(len(word) > LONG_WORD for word in text.split()):
            return ";overflow-wrap:anywhere"
        return f";min-width:{SENTENCE / 2:.0f}em" if len(text) > SENTENCE else ""  # a letter is half as wide as it is high

    numeric = [c for c in frame if pd.api.types.is_numeric_dtype(frame[c])]
    head = "".join(f'<th style="text-align:{"right" if c in numeric else "left"};padding:.2em .8em">{html.escape(str(c))}</th>' for c in frame)
    head = f"<thead><tr>{head}</tr></thead>" if any(str(c).strip() for c in frame) else ""
    body = "".join("<tr>" + "".join(f'<td style="text-align:{"right" if c in numeric else "left"};padding:.2em .8em;white-space:pre-wrap{wrapped(shown(v))}">{html.escape(shown(v))}</td>'
                                    for c, v in zip(frame.columns, row, strict=True)) + "</tr>" for row in frame.itertuples(index=False))
    title = f'<caption style="text-align:left;font-weight:600;padding:.4em .8em">{html.escape(caption)}</caption>' if caption else ""
    # A text with dollar signs is no formula for JupyterLab's MathJax.
    return f'<table class="tex2jax_ignore mathjax_ignore" style="border-collapse:collapse">{title}{head}<tbody>{body}</tbody></table>'


def pairs(values: dict[str, Any], caption: str = "") -> str:
    """Names and values as a two-column table without a head; mappings and lists in words."""
    return table(pd.DataFrame([{"": name, " ": _words(value)} for name, value in values.items()]), caption)


def _words(value: Any, inner: bool = False) -> str:
    """A parameter's value for reading: `max_model_len: 512, env: (A: 1, B: 2)`; a dash where it is empty."""
    if not isinstance(value, dict | list | tuple):
        return str(value) or "–"
    parts = [f"{k}: {_words(v, True)}" for k, v in value.items()] if isinstance(value, dict) else [_words(v, True) for v in value]
    return "–" if not parts else f"({', '.join(parts)})" if inner else ", ".join(parts)
