"""One self-contained HTML page: tables, and figures as pictures within it. No network needed."""

import base64
import html
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm.files.pictures import grid, to_picture

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1e; background: #fff; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p.about { color: #666; margin-top: .2rem; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th { font-weight: 600; } img { max-width: 100%; } img.pixels { image-rendering: pixelated; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; max-width: 46rem; }
"""


def page(title: str, about: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Returns the whole page of (heading, fragments of HTML)."""
    body = "".join(f"<h2>{html.escape(name)}</h2>{''.join(parts)}" for name, parts in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="about">{html.escape(about)}</p>{body}'
        "</body></html>\n"
    )


def text(words: str) -> str:
    """Returns a paragraph."""
    return f"<p>{html.escape(words)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a table; numbers stand to the right."""

    def cell(value: Any) -> str:
        words = str(value)
        number = re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?( ± [\d.,]+)?|n/a", words)
        return f"<td{' class=n' if number else ''}>{html.escape(words)}</td>"

    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join(f"<tr>{''.join(cell(v) for v in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def plain_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns the same table for a terminal."""
    lines = [[str(v) for v in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def images(pixels: np.ndarray, caption: str, *, columns: int | None = None) -> str:
    """Returns uint8[n, H, W, C] as a grid."""
    sheet = to_picture(grid(pixels, columns=columns), least_side=400)
    data = io.BytesIO()
    sheet.save(data, format="PNG")
    return _figure(data.getvalue(), caption, "pixels")


def plot(figure: Any, caption: str) -> str:
    """Returns a matplotlib figure as HTML."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return _figure(data.getvalue(), caption, "plot")


def axes(width: float = 8, height: float = 3.6, columns: int = 1) -> tuple[Any, Any]:
    """Returns a figure that needs no display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def number(value: float | None, digits: int = 4) -> str:
    """Returns a number with that many digits after the point; n/a for none."""
    return "n/a" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def _figure(png: bytes, caption: str, kind: str) -> str:
    words, data = html.escape(caption), base64.b64encode(png).decode()
    return (
        f'<figure><img class="{kind}" alt="{words}" src="data:image/png;base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>"
    )
