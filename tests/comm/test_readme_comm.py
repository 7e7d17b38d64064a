"""The chapter's README is true where a machine can tell: keys, files, variables, the lines of the check."""

import dataclasses
import pathlib
import re

import pytest
from launch import ROOT

from hpcmoe import environment
from hpcmoe.comm import nccl, staging
from hpcmoe.config import Config

README = (ROOT / "hpcmoe/comm/README.md").read_text()
SECTIONS = [getattr(Config(), field.name) for field in dataclasses.fields(Config)]
KEYS = {field.name for section in SECTIONS for field in dataclasses.fields(section)}


def test_every_module_is_listed_and_none_else():
    listed = {
        name for row in re.findall(r"^\| (`[^|]+`) \|", README, re.M) for name in re.findall(r"`(\w+\.\w+)`", row)
    }
    modules = {path.name for path in (ROOT / "hpcmoe/comm").iterdir() if path.suffix in (".py", ".cu")}
    assert listed == modules - {"__init__.py"}


def test_keys_exist_and_figures_are_the_codes():
    named = set(re.findall(r"`([a-z]+_[a-z_]+)(?: = \w+)?`", README)) - {
        "mpi_memory_alloc_kinds",
        "libuct_cuda",
        "cuda_copy",
        "slow_nodes",  # of check --json
    }
    assert named and named <= KEYS
    assert f"pieces of {staging._PIECE_BYTES >> 20} MB" in README
    assert f"before 2.{nccl.IN_ORDER_VERSION // 100 % 100} has" in README
    assert environment.NCCL_ORDER in README and environment.NCCL_SHARES in README


@pytest.mark.parametrize("name", ["UCX_TLS", "OMPI_MCA_pml", "MPIR_CVAR_NOLOCAL", "cuda_copy"])
def test_variables_are_those_that_are_read(name):
    assert name in README and f'"{name}"' in pathlib.Path(environment.__file__).read_text()


def test_commands_and_files_exist():
    targets = set(re.findall(r"make ([a-z-]+)", README))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"check", "run", "test-gpu", "bench-gpu"}
    assert all(re.search(rf"^{target}\b.*:", makefile, re.M) for target in targets)
    for path in re.findall(r"`(tests/[\w/.]+)`", README):
        assert (ROOT / path).is_file(), path


def test_the_check_shows_such_lines():
    shown = README[README.index("ranks        2") : README.index("```\n\n## MPI and CUDA")]
    source = (ROOT / "hpcmoe/check.py").read_text()
    for line in shown.splitlines():
        words = line[:12].split()
        assert not words or words[0] in ("GPUs", "try") or f'"{words[0]}"' in source, line
