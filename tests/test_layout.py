"""The code's own rules: imports point down, each check stands once, docstrings are sentences."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up: a room imports from those before it alone.
ROOMS = ("errors", "version", "diffusion", "models", "config", "files", "data", "backend",
         "sampling", "energy", "codec", "training", "evaluation", "build", "interop", "modes",
         "cli")  # fmt: skip
DOORS = ("__init__", "__main__")  # the public names and the command, which are of no room
FILES = sorted((ROOT / "ddpm").rglob("*.py"))
PROSE = [ROOT / "main.py", *FILES]
PROSE += sorted(
    f for name in ("configs", "examples", "benchmarks") for f in (ROOT / name).rglob("*.py")
)
TESTS = sorted(f for f in (ROOT / "tests").rglob("*.py") if f != Path(__file__))
# What a noun phrase does not begin with.
STRAY = {"Of", "By", "What", "With", "For", "As", "To", "Where", "From", "How", "In", "On", "At",
         "Whether", "Beside", "Between", "Without", "When", "If", "So", "Also", "Not", "Than",
         "Like", "Over", "Under", "Until", "Within", "And", "Or", "But", "Into", "Per"}  # fmt: skip


def room(file):
    return file.relative_to(ROOT / "ddpm").parts[0].removesuffix(".py")


def imported(file):
    """The modules of ddpm that a file imports, by name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddpm"):
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ddpm"))


def arrows():
    found = set()
    for file in FILES:
        if room(file) in DOORS:
            continue
        for name in imported(file):
            there = name.split(".")[1]
            if there != room(file):
                found.add((room(file), there))
    return found


def test_imports_point_down():
    assert {room(file) for file in FILES} == {*ROOMS, *DOORS}
    upward = [(a, b) for a, b in arrows() if ROOMS.index(b) > ROOMS.index(a)]
    assert not upward
    # The codec's room has three: to diffusion and sampling, and from the modes.
    assert len(arrows()) <= 56


def test_files_are_short_and_their_names_are_found_in_one_guess():
    names = {}
    for file in FILES:
        assert len(file.read_text().splitlines()) <= 400, file
        if file.stem != "__init__":
            names.setdefault(file.stem, []).append(str(file.relative_to(ROOT)))
    assert "utils" not in names
    twins = {name: files for name, files in names.items() if len(files) > 1}
    # A mode has the name of its command, and a noun of a config that of the objects it builds.
    assert set(twins) <= {"sample"}, twins


@pytest.mark.parametrize(
    ("words", "places"),
    [
        # The check, and the schedule's fact for those that a config chooses.
        (r"\.ends_without_signal\(\)", {"diffusion/schedules.py", "build/schedule.py"}),
        (r"\(height, width, channels\)\{", {"data/images.py"}),  # images of another shape
        (r"-\(-\w+ // devices\)", {"training/sharding.py"}),  # rounding to devices
        (r"127\.5", {"diffusion/pixels.py"}),  # scaling
    ],
)
def test_a_check_stands_once(words, places):
    found = set()
    for file in FILES:
        code = ast.unparse(_without_docstrings(ast.parse(file.read_text())))
        code = re.sub(r"(?m)^\s*raise ValueError\(f?'x_0 is of.*$", "", code)
        if re.search(words, code):
            found.add(str(file.relative_to(ROOT / "ddpm")))
    assert found == places


def _without_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value = ast.Constant("")
    return tree


def docstrings():
    for file in PROSE:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield f"{file.relative_to(ROOT)}: {getattr(node, 'name', 'module')}", node, text


def test_docstrings_begin_with_a_verb_or_a_subject():
    """A function's with a verb, as in 'Returns the log-SNR at t.'; others with a noun phrase."""
    wrong, count = [], 0
    for where, node, text in docstrings():
        first, count = text.split()[0].strip(",:;"), count + 1
        decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
        if isinstance(node, ast.FunctionDef) and "property" not in decorators:
            good = re.fullmatch(r"[A-Z][a-z]+s", first) is not None
        else:
            good = first not in STRAY
        if not good:
            wrong.append(f"{where}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
    assert count > 800


def test_public_functions_have_docstrings():
    missing = []
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            public = getattr(node, "name", "_")[0] != "_"
            if public and not ast.get_docstring(node):
                missing.append(f"{file.relative_to(ROOT)}: {node.name}")
    assert not missing


def test_old_names_are_gone():
    old = ("Guessing", "Beside", "Stride", "Stepped", "CLOSE_LEVELS", "_per_time",
           "by_log_snr", "write_whole")  # fmt: skip
    for file in [*PROSE, *TESTS, ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        words = set(re.findall(r"\w+", file.read_text()))
        odd = words & ({"told", *old} if file.suffix == ".py" else {"told"})
        assert not odd, (file, odd)
