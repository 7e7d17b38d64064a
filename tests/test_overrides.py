"""--set: strings as they stand, lists that have lost their quotes told what to type, all else refused in a line."""

import shlex

import pytest

from hpcmoe.config import Config, list_keys, read_config
from hpcmoe.errors import ConfigError
from hpcmoe.messages import show_value
from hpcmoe.overrides import kind_of


@pytest.fixture
def read(tmp_path):
    """Read an empty run.toml with some --set -> Config."""
    (tmp_path / "run.toml").write_text("")
    return lambda *overrides: read_config(tmp_path / "run.toml", overrides)[0]


def refusal(read, *overrides):
    """Give --set what is refused -> its line."""
    with pytest.raises(ConfigError) as refused:
        read(*overrides)
    (line,) = str(refused.value).splitlines()
    assert line.isprintable() and len(line) < 1400
    return line


@pytest.mark.parametrize(
    "text",
    [
        "123456", "2026-11-30", "2026-13-45", "12:00:00", "0xbeef", "true", "1e5", "inf", "nan", "-1", "1_000", "0o7",
        "[1]", "{a=1}", "a b", "a=b", "#1", "a#b", "it's", '"half', "'", "a.b", "\u00fc", "\u20ac\U0001f600",
    ],
)  # fmt: skip
def test_a_string_is_taken_as_it_stands(read, text):
    assert read(f"run.name={text}").run.name == text


def test_a_quoted_string_loses_its_quotes_alone(read):
    assert read('run.name="12"').run.name == read("run.name='12'").run.name == "12"
    assert read('run.name="a\\u0041"').run.name == "aA"
    assert read("model.dtype=bfloat16", 'experts.kind="relu"').model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("data.files=[/data/*.txt]", 'data.files=["/data/*.txt"]'),
        ("data.files=a.txt", 'data.files=["a.txt"]'),
        ("data.files=[a.txt, b c.txt]", 'data.files=["a.txt", "b c.txt"]'),
        ('data.files=["a.txt]', 'data.files=["a.txt"]'),
        ("data.exclude=2026-11-30", 'data.exclude=["2026-11-30"]'),
        ("data.files='a'", 'data.files=["a"]'),
        ("cluster.racks=[1, 2]", 'cluster.racks=["1", "2"]'),
        ("write.activations_of_layers=0,1", "write.activations_of_layers=[0, 1]"),
        ("write.activations_of_layers=1", "write.activations_of_layers=[1]"),
    ],
)
def test_a_list_without_quotes_or_brackets_is_told_what_to_type(read, typed, told):
    line = refusal(read, typed)
    assert line.endswith(f"; type --set {shlex.quote(told)}")
    assert ("quotes the shell takes" in line) == ('"' in told)
    read(*shlex.split(line.partition("; type --set ")[2]))


def test_what_is_told_of_a_name_with_a_quote_is_safe_to_type(read):
    line = refusal(read, "data.files=it's.txt")
    (typed,) = shlex.split(line.partition("; type --set ")[2])
    assert read(typed).data.files == ("it's.txt",)


@pytest.mark.parametrize(
    "override",
    [
        "", "=", "nan", "=1", "a.b.c=1", "run.b.c=1", "run=3", "run.=3", ".name=3", "run.steps=nan", "run.steps=1e5",
        "run.steps=" + "9" * 5000, "run.steps=0x" + "f" * 5000, "model.hidden=" + "[" * 3000,
        "model.hidden=" + "[" * 3000 + "]" * 3000, "data.files=" + "[" * 3000 + "]" * 3000,
        "train.epsilon=" + "9" * 5000,
        "run.name=\udcff", "run.name=\udcfcber", "run.na\udcffme=x", "data.files=['\udcff']", "run.name=a\nb",
        "run.steps=3\nb = 4", "run.name=a\0b", "run.name=\x1b[31m", "run.name=a\u2028b", "run.name=\x9b",
        "run.name=a\tb",
        'run.name="a\\nb"', "data.files=['a', \"\\u0007\"]", "run.name=" + "x" * 5000, "x" * 5000,
        "x." + "y" * 5000 + "=1",
        "a\nb.c=1", "run.steps=", "model.attention=yes", "model.attention=", "comm.device=gpu", "run.seed={a=1}",
        "run.seed=2026-11-30", "run.steps='3'", "run.steps=" + "{a=" * 900,
    ],
    ids=lambda override: show_value(override)[:40],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(read, override):
    assert refusal(read, override).startswith("--set ")


def test_the_last_of_two_wins_whatever_the_first_was(read):
    assert read("run.steps=nan", "run.steps=3").run.steps == 3
    assert refusal(read, "run.steps=3", "run.steps=nan").startswith("--set run.steps=nan: [run] steps = nan: must be")


def test_a_key_of_two_kinds_takes_both(read):
    found = [read(f"restart.hang_seconds={value}").restart.hang_limit for value in ("auto", '"auto"', "3", "0")]
    assert found == [None, None, 3.0, 0.0]
    rejected = refusal(read, "restart.hang_seconds=-1")
    assert rejected.endswith("hang_seconds = -1: must be 'auto' or greater than or equal to 0")


def test_the_kinds_are_those_of_the_annotations():
    kinds = {key: kind_of(annotation) for _, key, annotation in list_keys()}
    assert {key for key, kind in kinds.items() if kind == "a list of strings"} == {
        "files",
        "exclude",
        "racks",
        "lora_targets",
    }
    assert {key for key, kind in kinds.items() if kind == "a list of numbers"} == {"activations_of_layers"}
    strings = {key for key, kind in kinds.items() if kind == "a string"}
    with_text = {key for name, key, _ in list_keys() if isinstance(getattr(getattr(Config(), name), key), str)}
    assert strings == with_text - {"hang_seconds"}  # which takes a number too
