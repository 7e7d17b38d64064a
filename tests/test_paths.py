"""Paths of the config are expanded as a shell would, and what stands for nothing is refused by name."""

import os
import pathlib
import pwd
from types import SimpleNamespace

import pytest

from hpcmoe.config import Config, RunConfig, read_config
from hpcmoe.errors import ConfigError
from hpcmoe.main import read_run_arguments
from hpcmoe.paths import PATHS, expand_path, expand_paths, expand_pattern

ME = pwd.getpwuid(os.getuid())
PATH_KEYS = [f"{section}.{key}" for section, key in PATHS]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An empty config, in a folder that is HOME and $WHERE."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("WHERE", "some where")
    monkeypatch.setenv("NOTHING", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    pathlib.Path("run.toml").touch()
    return "run.toml"


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("plain/a b", "plain/a b"),
        ("~", "{me}"),
        ("~/a/~", "{me}/a/~"),
        ("a~/~b", "a~/~b"),
        ("./~/x", "./~/x"),
        ("$WHERE/x", "some where/x"),
        ("a${WHERE}b/$WHERE", "asome whereb/some where"),
        ("~/$WHERE-1", "{me}/some where-1"),
        ("costs$5/a$", "costs$5/a$"),
        (f"~{ME.pw_name}/x", f"{ME.pw_dir}/x"),
    ],
)
def test_a_path_is_expanded_as_a_shell_would(file, tmp_path, path, expanded):
    assert expand_path(path, "") == expanded.replace("{me}", str(tmp_path / "me"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("$NOWHERE/x", "$NOWHERE is not set, or is empty"),
        ("x/${NOWHERE}", "$NOWHERE is not set, or is empty"),
        ("$NOTHING/x", "$NOTHING is not set, or is empty"),
        ("${no such}/x", "$no such is not set, or is empty"),
        ("~no-such-user/x", "no user no-such-user"),
        ("~\n/x", r"no user \n"),
        ("a\0b", "must hold no zero byte"),
        ("a\ud800b", "has characters that names of files here cannot have"),
    ],
)
def test_what_stands_for_nothing_is_refused_by_name_in_one_line(file, path, said):
    with pytest.raises(ConfigError) as refused:
        expand_path(path, "[run] output")
    assert str(refused.value).startswith("[run] output = ") and str(refused.value).endswith(f": {said}")
    assert str(refused.value).isprintable()


def test_a_runs_name_that_no_folder_here_can_have_is_refused_in_one_line(monkeypatch):
    def encode(name):
        return name.encode("ascii")

    monkeypatch.setattr("os.fsencode", encode)  # as where the locale is C, and Python is told to believe it
    with pytest.raises(ConfigError, match=r"\[run\] name = .*: has characters that names of files here cannot have$"):
        expand_paths(Config(run=RunConfig(name="\u00fcn")), lambda *_: "x.toml")


def test_home_is_the_users_own_where_the_environment_has_none(file, monkeypatch):
    monkeypatch.delenv("HOME")
    assert expand_path("~/x", "") == f"{ME.pw_dir}/x"
    monkeypatch.setattr("pwd.getpwuid", lambda _: SimpleNamespace(pw_dir=""))
    with pytest.raises(ConfigError, match=r"\$HOME is not set"):
        expand_path("~/x", "")


def test_a_value_that_is_not_utf_8_is_taken_as_it_is(file, monkeypatch):
    monkeypatch.setenv("WHERE", "a\udcffb")
    assert os.fsencode(expand_path("$WHERE/x", "")) == b"a\xffb/x"


@pytest.mark.parametrize("key", PATH_KEYS)
def test_every_path_of_the_config_is_expanded(file, tmp_path, key):
    section, name = key.split(".")
    pathlib.Path(file).write_text(f'[{section}]\n{name} = "~/$WHERE"\n')
    config, text = read_config(file)
    assert getattr(getattr(config, section), name) == f"{tmp_path}/me/some where"
    assert "~/$WHERE" in text


def test_no_other_key_of_the_config_sounds_like_a_path():
    manual = (pathlib.Path(__file__).parents[1] / "inputs" / "run.toml").read_text()
    named = {
        line.split(" ")[0]
        for line in manual.splitlines()
        if "; or a file" in line or line.startswith(("output ", "path "))
    }
    assert named == {key for _, key in PATHS}


def test_every_path_that_stands_for_nothing_is_told_with_its_source(file):
    pathlib.Path(file).write_text('[run]\noutput = "$NOWHERE"\n[data]\nfiles = ["a", "~none/*"]\nexclude = ["a"]\n')
    with pytest.raises(ConfigError) as refused:
        read_config(file, ["data.exclude=['${NOTHING}/*', 'b']", "placement.loads=~/$NOWHERE"])
    assert str(refused.value).splitlines() == [
        "run.toml: [run] output = '$NOWHERE': $NOWHERE is not set, or is empty",
        "--set placement.loads=~/$NOWHERE: [placement] loads = '~/$NOWHERE': $NOWHERE is not set, or is empty",
        "run.toml: [data] files = '~none/*': no user none",
        "--set data.exclude=['${NOTHING}/*', 'b']: [data] exclude = '${NOTHING}/*': $NOTHING is not set, or is empty",
    ]


def test_a_file_of_that_very_name_is_no_pattern(file, tmp_path):
    pathlib.Path("a$NOWHERE.txt").touch()
    pathlib.Path("~").mkdir()
    assert expand_pattern("a$NOWHERE.txt", "") == "a$NOWHERE.txt"
    assert read_config(file, ["data.files=['a$NOWHERE.txt']"])[0].data.files == ("a$NOWHERE.txt",)
    assert expand_pattern("~", "") == f"{tmp_path}/me"


def test_the_folder_to_resume_is_expanded(file, tmp_path):
    assert read_run_arguments(["run.toml", "--resume=~/$WHERE"]).resume == f"{tmp_path}/me/some where"
    assert read_run_arguments(["run.toml", "--resume"]).resume == ""
    with pytest.raises(ConfigError, match=r"^--resume = '\$NOWHERE': \$NOWHERE is not set, or is empty$"):
        read_run_arguments(["run.toml", "--resume", "$NOWHERE"])
