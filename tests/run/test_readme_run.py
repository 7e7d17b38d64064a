"""The chapter's README names keys that exist, and the figures that a migration records."""

import dataclasses
import inspect
import re

from launch import ROOT

from hpcmoe.config import Config
from hpcmoe.run import move_experts, rebalance

README = (ROOT / "hpcmoe/run/README.md").read_text()


def test_every_key_that_it_names_exists():
    sections = [getattr(Config(), field.name) for field in dataclasses.fields(Config)]
    keys = {key.name for section in filter(dataclasses.is_dataclass, sections) for key in dataclasses.fields(section)}
    named = set(re.findall(r"`(?:\[\w+\] )?([a-z_]+)(?: = [^`]+)?`", README))
    assert named - keys == set()


def test_it_names_what_a_migration_records():
    names = re.findall(r'\("(\w+)", [\w.()]+, "|"cluster", "(\w+)"', inspect.getsource(rebalance.Rebalancer))
    assert names and [name for pair in names for name in pair if name and f"`cluster/{name}`" not in README] == []
    assert f"{move_experts.STAGING_BYTES >> 20} MB" in README
