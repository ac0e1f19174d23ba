"""One self-contained HTML page: tables, and figures as pictures within it. No network needed."""

import base64
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm.files.pictures import grid, to_picture

LEAST_SIDE = 800  # pixels of a grid of images

_STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --soft: #5b5b60; --line: #d8d8dc; --page: #fff;
  --link: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8ea; --soft: #a5a5ab; --line: #3d3d42;
  --page: #161618; --link: #8ab4f8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; }
a { color: var(--link); }
p { max-width: 46rem; overflow-wrap: anywhere; }
p.about, figcaption { color: var(--soft); margin-top: .2rem; }
nav ol { columns: 16rem; padding-left: 1.5rem; }
div.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; }
th, td { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.part { padding-left: 1.2rem; }
details { margin: .8rem 0; } summary { cursor: pointer; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; max-width: 46rem; }
img { display: block; max-width: 100%; max-height: 92vh; height: auto; object-fit: contain;
  object-position: left; background: #fff; }
img.plot { max-width: min(100%, 50rem); }
img.pixels { image-rendering: pixelated; background: none; }
div.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 0 1.5rem; }
div.pair figure { margin-bottom: 0; }
"""
# What a terminal shows -> the same on a page; an arrow stays on the line of its figure.
_SIGNS = {"<=": "≤", ">=": "≥", " .. ": " … ", " ↓": "\xa0↓", " ↑": "\xa0↑"}


def page(title: str, about: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Returns the whole page of (heading, fragments of HTML), with a table of contents."""
    links, body = "", ""
    for i, (name, parts) in enumerate(sections, start=1):
        links += f'<li><a href="#part{i}">{typeset(name)}</a></li>'
        body += f'<section id="part{i}"><h2>{typeset(name)}</h2>{"".join(parts)}</section>\n'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        f'<h1>{html.escape(title)}</h1><p class="about">{html.escape(about)}</p>'
        f'<nav aria-label="Contents"><ol>{links}</ol></nav>\n{body}</body></html>\n'
    )


def typeset(words: str) -> str:
    """Returns plain words as HTML: L_{T-1} with a subscript, <= as one sign, 1e-9 as a power."""
    for plain, sign in _SIGNS.items():
        words = words.replace(plain, sign)
    words = re.sub(r"(?<![\w.])-(?=\d)", "−", html.escape(words))
    words = re.sub(r"(?<=\d)x(?=\d)", "×", words)
    words = re.sub(
        r"\b(\d(?:\.\d+)?)e([-+]?)0*(\d+)\b",
        lambda m: f"{m[1]}\xa0×\xa010<sup>{'−' * (m[2] == '-')}{m[3]}</sup>",
        words,
    )
    return re.sub(
        r"\b([A-Za-z])_(?:\{([^{}]+)\}|(\w+))",
        lambda m: f"<i>{m[1]}</i><sub>{(m[2] or m[3]).replace('-', '−')}</sub>",
        words,
    )


def text(words: str) -> str:
    """Returns a paragraph."""
    return f"<p>{typeset(words)}</p>"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    words: Callable[[str], str] = typeset,
) -> str:
    """Returns a table; numbers stand to the right, parts of the row above (their names begin with
    spaces) are indented. `words` makes HTML of a cell's text."""

    def cell(value: Any) -> str:
        plain = str(value)
        number = re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?( ± [\d.,]+)?|n/a", plain)
        kind = "number" if number else "part" if plain.startswith("  ") else ""
        mark = f' class="{kind}"' if kind else ""
        return f"<td{mark}>{words(plain.strip())}</td>"

    head = "".join(f'<th scope="col">{words(h)}</th>' for h in header)
    body = "".join(f"<tr>{''.join(cell(v) for v in row)}</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
        "</table></div>\n"
    )


def settings(header: str, values: Mapping[str, Any], marked: Sequence[str] = ()) -> str:
    """Returns a table of keys and values as they are in a config, `marked` ones in bold."""

    def shown(key: str, value: Any) -> tuple[str, str]:
        code = f"<code>{html.escape(repr(value))}</code>"
        return f"<code>{html.escape(key)}</code>", f"<b>{code}</b>" if key in marked else code

    rows = [shown(key, value) for key, value in values.items()]
    return table((html.escape(header), "value"), rows, words=str)


def folded(summary: str, fragment: str) -> str:
    """Returns a fragment that is shown when its summary is clicked."""
    return f"<details><summary>{typeset(summary)}</summary>{fragment}</details>\n"


def plain_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns the same table for a terminal."""
    lines = [[str(v) for v in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def images(pixels: np.ndarray, caption: str, *, columns: int | None = None) -> str:
    """Returns uint8[n, H, W, C] as a grid."""
    sheet = to_picture(grid(pixels, columns=columns), least_side=LEAST_SIDE)
    data = io.BytesIO()
    sheet.save(data, format="PNG", optimize=True)
    return picture(data.getvalue(), caption, "pixels")


def plot(figure: Any, caption: str) -> str:
    """Returns a matplotlib figure as HTML."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=144)
    return picture(data.getvalue(), caption, "plot")


def pair(*figures: str) -> str:
    """Returns figures side by side, or one below the other where the screen is narrow."""
    return f'<div class="pair">{"".join(figures)}</div>\n'


def axes(width: float = 8, height: float = 3.6) -> tuple[Any, Any]:
    """Returns a figure that needs no display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def number(value: float | None, digits: int = 4) -> str:
    """Returns a number with that many digits after the point; n/a for none."""
    return "n/a" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def picture(png: bytes, caption: str, kind: str) -> str:
    """Returns a PNG with a caption; `kind` is 'pixels', which stay sharp if enlarged, or 'plot'."""
    words, data = typeset(caption), base64.b64encode(png).decode()
    plain = re.sub(r"<[^>]+>", "", words)
    return (
        f'<figure><img class="{kind}" alt="{plain}" src="data:image/png;base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>\n"
    )
