"""The chapter's README is true where a machine can tell: keys, files, launchers, racks."""

import dataclasses
import re

from launch import ROOT

from hpcmoe.cluster import racks
from hpcmoe.config import ClusterConfig
from hpcmoe.start import LAUNCHERS

README = (ROOT / "hpcmoe/cluster/README.md").read_text()


def test_every_module_is_listed_and_none_else():
    rows = re.findall(r"^\| (`[^|]+`) \|", README, re.M)
    listed = {name for row in rows for name in re.findall(r"`([\w/]+\.?\w*)`", row)}
    folder = ROOT / "hpcmoe/cluster"
    modules = {path.name for path in folder.glob("*.py")} | {
        f"{path.parent.name}/" for path in folder.glob("*/__init__.py")
    }
    assert listed == modules - {"__init__.py"}


def test_keys_files_and_racks_are_the_programs():
    keys = set(re.findall(r"`([a-z]+_[a-z_]+)`", README))
    assert keys == {"measure_seconds", "measure_bytes", "memory_bytes_per_node"} and keys <= {
        field.name for field in dataclasses.fields(ClusterConfig)
    }
    assert f"`{racks._ONE}`" in README and f"rack `{racks._UNKNOWN}`" in README
    for path in re.findall(r"`((?:inputs|hpcmoe)/[\w/.]+)`", README):
        assert (ROOT / path).is_file(), path


def test_all_launchers_are_named():
    known = README[README.index("Known are") : README.index("(`hpcmoe/start.py`)")]
    for launcher in LAUNCHERS:
        assert launcher.name.removeprefix("mpirun of ").split(" or ")[0] in known, launcher.name
