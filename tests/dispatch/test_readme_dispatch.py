"""The chapter's README is true where a machine can tell: modules, keys, calls, figures."""

import dataclasses
import re

from launch import ROOT

from hpcmoe.config import Config
from hpcmoe.dispatch.dispatcher import TokenDispatcher
from hpcmoe.dispatch.sizes import MIN_BATCH_ROWS

CHAPTER = ROOT / "hpcmoe" / "dispatch"
README = (CHAPTER / "README.md").read_text()


def keys_of(section):
    """The keys of a section of run.toml."""
    return {field.name for field in dataclasses.fields(getattr(Config(), section))}


def test_it_names_every_module_and_no_other():
    modules = {path.name for path in CHAPTER.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", README)) == modules


def test_the_keys_it_names_exist_and_none_of_dispatch_is_missing():
    known = {key for section in ("dispatch", "comm", "model") for key in keys_of(section)}
    names = set(re.findall(r"`(\w+_\w+)(?:`| = )", README))
    assert names - known <= {"return_batch", "poll_ready", "poll_results"}
    assert {key for key in keys_of("dispatch") if f"`{key}" not in README} == set()


def test_the_calls_it_shows_are_those_of_a_dispatcher():
    assert set(re.findall(r"dispatcher\.(\w+)\(", README)) <= set(vars(TokenDispatcher))
    assert f"at least {MIN_BATCH_ROWS}" in README
