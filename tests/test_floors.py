"""The import order is the story's order, and each seam to the outside is in one place."""

import ast
import configparser
import pathlib
import re
import sys

from launch import ROOT, run

GROUND = (
    "__version__", "output", "interrupts", "wait", "watcher", "pulse", "watch", "start", "segments", "mpi_library",
    "clock", "errors", "environment", "hangs", "messages", "survivors", "paths", "replacing", "arguments", "results",
    "reading", "float32", "renamed", "contradictions", "overrides", "validate", "sections", "ending", "config", "idle",
    "gemm",
)  # fmt: skip
CHAPTERS = sorted(folder.parent.name for folder in (ROOT / "hpcmoe").glob("*/__init__.py"))  # the alphabet is the order
FLOORS = (
    *GROUND,
    *CHAPTERS,
    "description",
    "rank_speed",
    "measuring",
    "resuming",
    "checkpointing",
    "reopen",
    "group",
    "hf",
    "model_check",
    "finetune",
)
PROGRAMS = ("families", "main", "place", "plan", "check", "generate", "settings", "supervise", "__main__")
FLOOR_OF_CHAPTER = {chapter: floor for floor, chapter in enumerate(FLOORS)} | dict.fromkeys(PROGRAMS, len(FLOORS))
WRITE_MAY_IMPORT = {
    "__version__",  # run.h5 says what made it
    "environment", "interrupts", "wait", "errors", "messages", "reading", "replacing", "config", "cluster", "placement",
    "write",
}  # fmt: skip

PACKAGE = ROOT / "hpcmoe"
FILES = sorted(PACKAGE.rglob("*.py"))
SEAMS = {
    r"\bimport cupy\b|\bfrom cupy\b|\btorch\.cuda\b": {"comm/cuda.py", "comm/nccl.py"},
    r"\bSLURM_": {"cluster/", "environment.py", "segments.py", "start.py"},
    r"\bos\.environ\b|\bos\.getenv\b": {"environment.py", "mpi_library.py", "segments.py", "start.py"},
    r"(?<!')\bh5py\b": {"write/"},
    r"\bprint\(|\bsys\.stdout\b": {"output.py"},
}
SET_BEFORE_MPI = r"\bos\.environ\.setdefault\("  # main.py alone may, for what must stand before MPI starts


def chapter_of(file):
    """Name the chapter of a file: its folder in the package, or itself; a chapter's __main__ is a program."""
    return "__main__" if file.name == "__main__.py" else file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(file):
    """List the modules that a file imports, anywhere in it; a relative import counts as `.`."""
    return imports_in(ast.parse(file.read_text()))


def imports_in(tree):
    """List the modules that a part of a file imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(level=level) if level > 0:
                yield "."
            case ast.ImportFrom(module="hpcmoe", names=names):
                yield from (f"hpcmoe.{alias.name}" for alias in names)
            case ast.ImportFrom(module=module):
                yield module


def code_of(file):
    """Read a file as code alone: docstrings and comments may name what they like."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant()), *_]:
                node.body[0] = ast.Pass()
    return ast.unparse(tree)


def typed_names(file):
    """List the modules that a file imports for type checkers alone, within `if TYPE_CHECKING:`."""
    blocks = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.If)]
    typed = [block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING"]
    return {module for block in typed for module in imports_in(block)}


def misplaced(file):
    """List what a file imports and may not."""
    chapter = chapter_of(file)
    if chapter == "__init__":  # its names are imported when they are used; what type checkers read does not run
        return {module for module in imports_of(file) if module.startswith(("hpcmoe", "."))} - typed_names(file)
    modules = [module for module in imports_of(file) if module.split(".")[0] in ("hpcmoe", "")]
    imported = {module.removeprefix("hpcmoe.").split(".")[0] for module in modules}
    assert chapter in FLOOR_OF_CHAPTER, f"{chapter} has no floor"
    above = {other for other in imported if FLOOR_OF_CHAPTER.get(other, 99) >= FLOOR_OF_CHAPTER[chapter]} - {chapter}
    return above | (imported - WRITE_MAY_IMPORT if chapter == "write" else set()) | imported & {""}  # relative ones


def test_a_module_imports_only_from_its_own_chapter_or_an_earlier_one():
    found = {str(file.relative_to(PACKAGE)): misplaced(file) for file in FILES}
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_the_drawn_graph_has_no_circle_and_no_arrow_upward():
    drawn = run(sys.executable, ROOT / "tests" / "draw_imports.py")
    assert drawn.status == 0, drawn.output
    assert not set(FLOORS) - set(drawn.output.split())


def test_circles_and_arrows_upward_are_marked():
    from draw_imports import draw, find_marks

    graph = {"a": {"d"}, "b": {"a", "c"}, "c": {"b"}, "d": set()}
    marks = find_marks(graph)
    assert marks == {("a", "d"): "^", ("b", "a"): ".", ("b", "c"): "o", ("c", "b"): "o"}
    assert draw(graph, marks).splitlines()[1:] == [
        " 0 a  \\        ^",
        " 1 b  .  \\  o",
        " 2 c     o  \\",
        " 3 d           \\",
    ]


def test_a_seam_is_in_one_place():
    crossed = []
    for file in FILES:
        name, code = str(file.relative_to(PACKAGE)), code_of(file)
        if name == "main.py":
            code = re.sub(SET_BEFORE_MPI, "", code)
        crossed += [
            (pattern, name)
            for pattern, allowed in SEAMS.items()
            if not name.startswith(tuple(allowed)) and re.search(pattern, code)
        ]
    assert crossed == []


def test_a_chapter_opens_with_one_docstring_and_nothing_else():
    for file in PACKAGE.rglob("*/__init__.py"):
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1, file


def test_every_chapter_has_its_tests_in_a_folder_of_its_name():
    chapters = {folder.parent.relative_to(PACKAGE) for folder in PACKAGE.rglob("*/__init__.py")}
    assert chapters == {name for name in chapters if list((ROOT / "tests" / name).glob("test_*.py"))}


def test_the_reading_of_imports_sees_every_form(tmp_path):
    file = pathlib.Path(tmp_path / "module.py")
    file.write_text("import hpcmoe.a\nfrom hpcmoe import b\nfrom hpcmoe.c import d\nfrom . import e\nimport numpy\n")
    assert list(imports_of(file)) == ["hpcmoe.a", "hpcmoe.b", "hpcmoe.c", ".", "numpy"]


def test_what_is_imported_is_what_setup_cfg_asks_for():
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    extras = options["options.extras_require"]
    lines = options["options"]["install_requires"] + extras["gpu"] + extras["hf"] + extras["plot"]
    asked = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines.splitlines() if line}
    imported = {module.split(".")[0] for file in FILES for module in imports_of(file)}
    others = imported - sys.stdlib_module_names - {"hpcmoe"}
    assert {name for name in others if not any(name == a or a.startswith(f"{name}_") for a in asked)} == set()
