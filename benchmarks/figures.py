"""Figures with unit, number and spread; the file that keeps them; the tables made of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np

from ddpm.errors import InputError
from ddpm.files.atomic import write_atomically


def figure(values: Sequence[float], unit: str) -> dict[str, Any]:
    """Returns the median and the quartiles of what was measured, with their number."""
    low, median, high = (float(x) for x in np.percentile(values, (25, 50, 75)))
    return {"unit": unit, "n": len(values), "median": median, "quartiles": [low, high]}


class Results:
    """The parts that were measured, by name, in a JSON file that is complete after every part.

    A part is rows of figures, {row: {column: figure, or words in its place}}; 'failed' or 'left
    out' stand in the place of rows with the reason.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.all: dict[str, Any] = {"about": about, "parts": {}}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            there, _ = found["about"], found["parts"].items()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path}: is no file of benchmarks/accelerator.py: choose another --out"
            ) from error
        if there != about:
            odd = next(k for k in (*there, *about) if there.get(k) != about.get(k))
            raise InputError(
                f"{path}: holds figures taken with {odd} = {there.get(odd)}, and this is "
                f"{about.get(odd)}: choose another --out"
            )
        self.all = found

    @property
    def parts(self) -> dict[str, Any]:
        """Returns what each part came to, by name."""
        return self.all["parts"]

    def done(self, name: str) -> bool:
        """Returns whether a part is measured, or left out; one that failed is tried again."""
        return name in self.parts and "failed" not in self.parts[name]

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keeps what a part came to, at once."""
        self.parts[name] = result
        text = json.dumps(self.all, indent=1) + "\n"
        write_atomically(self.path, lambda path: path.write_text(text))


def text_of(value: Any) -> str:
    """Returns a figure as a cell of a table, or the words in its place."""
    if value is None or isinstance(value, str):
        return (value or "").replace("|", "/")
    low, high = value["quartiles"]
    spread = f" ({_number(low)} to {_number(high)})" if value["n"] > 1 else ""
    return f"{_number(value['median'])}{spread}, n={value['n']}"


def _number(x: float) -> str:
    if x == 0 or 0.001 <= abs(x) < 1e7:
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return f"{x:.2e}"


def markdown(results: Results) -> str:
    """Returns the tables of all sections that were measured: median (quartiles), n."""
    about, parts = results.all["about"], results.parts
    title = "# Figures on an accelerator"
    if about["rehearsal"]:
        title = "# A rehearsal: tiny networks, figures of no meaning"
    lines = [title, ""]
    sections: dict[str, dict[str, Any]] = {}
    for name, result in parts.items():
        section, _, rest = name.partition("/")
        sections.setdefault(section, {})[rest] = result
    for section, found in sections.items():
        lines += [f"## {section}", ""]
        lines += _list(found[""]) if section == "machine" else _table(found)
        lines.append("")
    return "\n".join(lines)


def _list(found: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in found.items())]


def _table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the table of a section: a row for each of its parts' rows, a column for each
    figure."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for name, result in found.items():
        for key, cells in result.items():
            rows.append((f"{name} {key}", {key: cells} if isinstance(cells, str) else cells))
    columns = list(dict.fromkeys(column for _, cells in rows for column in cells))
    titles = [column + _unit([cells.get(column) for _, cells in rows]) for column in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows:
        values = [text_of(cells.get(column)) for column in columns]
        lines.append(f"| {name.strip().replace('|', '/')} | {' | '.join(values)} |")
    return lines


def _unit(values: list[Any]) -> str:
    units = {value["unit"] for value in values if isinstance(value, dict)}
    return f", {' or '.join(sorted(units))}" if units else ""
