"""What others set in the environment is read as what it should be, or refused with its name and value."""

import os

import pytest

from hpcmoe.environment import environment_without, is_set, read_counts, read_memory, read_number, read_setting
from hpcmoe.errors import ClusterError

NONSENSE = ("x", "-1", "1.5", "1e3", "0x10", "9" * 5000, "٣", "1 2", "16GG", "G", "nan", "\udcff", "(null)")


def test_text_is_as_it_is_set_but_for_space_around_it():
    assert read_setting("A", {"A": " b \n"}) == "b"
    assert read_setting("A", {}) == "" and not is_set("A", {}) and is_set("A", {"A": ""})


@pytest.mark.parametrize(("text", "number"), [(None, 7), ("", 7), (" ", 7), ("0", 0), (" 12 ", 12), ("007", 7)])
def test_a_number_is_whole_and_its_default_stands_where_nothing_is_set(text, number):
    assert read_number("N", default=7, environ={} if text is None else {"N": text}) == number


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (None, 0), ("", 0), ("0", 0), ("4096", 2**32), ("4096M", 2**32), ("16G", 2**34), ("16g", 2**34),
        ("1T", 2**40), ("2P", 2**51), ("1024K", 2**20),
    ],
)  # fmt: skip
def test_memory_is_read_in_slurm_s_units(text, num_bytes):
    assert read_memory("M", {} if text is None else {"M": text}) == num_bytes


@pytest.mark.parametrize(("text", "counts"), [("", []), ("8", [8]), ("72(x2),36", [72, 72, 36]), ("4(x4)", [4] * 4)])
def test_numbers_of_nodes_are_repeated_as_slurm_does(text, counts):
    assert read_counts("C", {"C": text}) == counts


@pytest.mark.parametrize("read", [read_number, read_memory, read_counts])
@pytest.mark.parametrize("text", NONSENSE)
def test_what_is_no_number_is_refused_in_one_line_with_variable_and_value(read, text):
    with pytest.raises(ClusterError) as refused:
        read("SLURM_THING", environ={"SLURM_THING": text})
    told = str(refused.value)
    assert told.startswith(f"the environment's SLURM_THING = {text[:40]!r}"[:40]) and ": must be " in told
    assert len(told.splitlines()) == 1 and len(told) < 250


def test_a_number_beyond_what_can_be_is_refused():
    with pytest.raises(ClusterError, match="N = '5000': must be a whole number of 0 to 4096"):
        read_number("N", most=4096, environ={"N": "5000"})


def test_a_command_may_be_started_without_some_variables(monkeypatch):
    monkeypatch.setenv("CUTS", "1")
    assert set(os.environ) - set(environment_without("CUTS", "ABSENT")) == {"CUTS"}
