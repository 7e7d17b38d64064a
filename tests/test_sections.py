"""What each constructor is given of a config: its own section or plain values, and nothing below run/ all of it."""

import ast

import pytest
from launch import ROOT

BELOW_RUN = (
    "cluster", "comm", "dispatch", "experts", "model", "pipeline", "placement", "prepare", "report", "write",
)  # fmt: skip
FILES = sorted(file for chapter in BELOW_RUN for file in (ROOT / "hpcmoe" / chapter).rglob("*.py"))


def find_uses(source):
    """Yield what a module's text uses of a whole config: its class, a parameter of that name, or its [run]."""
    tree = ast.parse(source)
    modules = {
        alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="hpcmoe.config", names=names) if "Config" in {alias.name for alias in names}:
                yield node.lineno, "imports Config"
            case ast.arg(arg="config"):
                yield node.lineno, "takes config"
            case ast.Attribute(attr="config", value=ast.Name(id=name)) if name in modules:
                pass  # a library's own
            case ast.Attribute(attr="config"):
                yield node.lineno, "reads .config"
            case ast.Attribute(attr="run", value=ast.Name(id="config") | ast.Attribute(attr="config")):
                yield node.lineno, "reads [run]"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_below_run_sees_the_whole_config(file):
    found = [what for _, what in find_uses(file.read_text())]
    if file.is_relative_to(ROOT / "hpcmoe" / "model" / "hf"):  # models of transformers have a config of their own
        found = [what for what in found if what not in ("takes config", "reads .config")]
    assert found == []


def test_each_way_to_the_whole_config_is_found():
    for source in (
        "from hpcmoe.config import Config, ModelConfig",
        "def make(config): pass",
        "def make(self, *, config=None): pass",
        "lambda config: 3",
        "size = job.config",
        "mode = config.run.mode",
        "mode = self.config.run.mode",
    ):
        assert list(find_uses(source)), source
    assert list(find_uses("import numba\nfrom hpcmoe.config import ModelConfig\nnumba.config.DISABLE_JIT = 1")) == []
