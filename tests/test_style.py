"""Functions stay short, public ones are explained and typed, names are the field's, run.toml is the whole manual."""

import ast
import dataclasses
import re
import statistics
import subprocess
import tomllib

import house
import pytest
from launch import ROOT

from hpcmoe.config import Config

FILES = sorted((ROOT / "hpcmoe").rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LONGEST_FUNCTION, LONGEST_FILE, LONGEST_MEDIAN = 60, 300, 12  # lines
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:work|root|farm|home/\w+|Users/\w+|opt/(?:pypi|wheels)\w*)/")


def functions_of(file):
    """List a file's functions and methods, nested ones too."""
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, FUNCTIONS)]


def length_of(function):
    """Count a function's lines, from def to its end."""
    return function.end_lineno - function.lineno + 1


def explained(file):
    """List a file's public functions, methods and classes: what must have a docstring."""
    tree = ast.parse(file.read_text())
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (m for m in node.body if isinstance(m, FUNCTIONS) and not m.name.startswith("_"))


def repository_texts():
    """List the repository's text files, committed or about to be."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if names.returncode != 0:
        pytest.skip("not a git repository")
    return [ROOT / name for name in names.stdout.split("\0") if name and (ROOT / name).is_file()]


def name_of(file):
    """Name a file by its path in the repository."""
    return str(file.relative_to(ROOT))


def test_files_and_functions_are_short():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
    functions = {(name_of(file), f.name): length_of(f) for file in FILES for f in functions_of(file)}
    assert {name: length for name, length in functions.items() if length > LONGEST_FUNCTION} == {}


def test_the_median_function_is_short():
    assert statistics.median(length_of(f) for file in FILES for f in functions_of(file)) <= LONGEST_MEDIAN


def test_what_is_public_has_a_docstring():
    assert [name_of(file) for file in FILES if not ast.get_docstring(ast.parse(file.read_text()))] == []
    public = [(name_of(file), node) for file in FILES for node in explained(file)]
    assert [(name, node.name) for name, node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("rule", house.RULES)
def test_the_house_rules_hold(rule):
    assert list(house.RULES[rule](house.parse(ROOT))) == []


@pytest.mark.parametrize(
    ("rule", "text", "found"),
    [
        ("one public name, one thing", "def send(): pass", ["send"]),
        ("one public name, one thing", "_send = main = log = 1", []),
        ("docstrings begin with a plain imperative", 'def f():\n    """Tell of rows."""', ["f"]),
        ("docstrings begin with a plain imperative", 'def is_f():\n    """Return whether."""', ["is_f"]),
        ("docstrings begin with a plain imperative", 'def is_f():\n    """Return True if it is."""', []),
        ("no word of the old dialect", "def f(x_slope): mate_rank = x_slope", ["x_slope", "mate_rank"]),
        ("no word of the old dialect", "slate = template", []),
        ("public functions are annotated", "class A:\n    def f(self, x: int, y): pass", ["A.f"]),
        ("public functions are annotated", "def f(x: int) -> int: return x\ndef _g(y): pass", []),
    ],
)
def test_the_house_rules_find_what_breaks_them(rule, text, found):
    trees = {"a.py": ast.parse(text), "b.py": ast.parse(text if rule.startswith("one") else "")}
    lines = [line for line in house.RULES[rule](trees) if line.startswith("a.py")]
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == found


def test_run_toml_shows_every_key_at_its_default():
    shown = tomllib.loads((ROOT / "inputs" / "run.toml").read_text())
    assert shown == plain(Config())


def plain(value):
    """Turn a dataclass of defaults into what tomllib reads: dicts and lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


def test_no_file_names_a_path_of_one_machine():
    named = {}
    for file in repository_texts():
        lines = file.read_text(errors="ignore").splitlines()
        named[str(file.relative_to(ROOT))] = [line for line in lines if MACHINE_PATHS.search(line)]
    named.pop("tests/test_style.py", None)  # the pattern itself
    assert {name: lines for name, lines in named.items() if lines} == {}
