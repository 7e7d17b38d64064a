"""Files of the input: whatever a path names is read, or refused in one line within a moment."""

import os
import threading

import pytest

from hpcmoe import reading
from hpcmoe.config import read_config
from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line, show_value
from hpcmoe.reading import read_json, read_text


def refusal(path, read=read_text, **options):
    """Read what cannot be read -> its line."""
    with pytest.raises(ConfigError) as refused:
        read(path, **options)
    (line,) = str(refused.value).split("\n")
    assert line.isprintable() and len(line) < 1400
    return line


@pytest.mark.parametrize("content", [b"a = 1\n", b"\xef\xbb\xbfa = 1\n", b"a = 1\r\n", b"a = 1\r"])
def test_marks_and_line_ends_of_other_systems_are_read(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert read_text(tmp_path / "file") == "a = 1\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[run]\n".encode("utf-16"), "not a text file in UTF-8: UTF-16; save it as UTF-8"),
        ("[run]\n".encode("utf-16-be"), "not TOML: "),
        (b"\xfe\xff\x00a", "UTF-16; save it as UTF-8"),
        (b"[run]\nname = '\xfc'", "not a text file in UTF-8: byte 14 is not"),
        (b"\x00", "not TOML: "),
        (b"a = " + b"[" * 3000, "not TOML: nested too deeply"),
        (b"[run]\nseed = " + b"9" * 5000, "not TOML: a whole number has thousands of digits"),
        (b"[run]\nseed = 0x" + b"f" * 5000, "[run] seed = a whole number of 20000 bits: must be less than"),
        (b"[train]\nepsilon = 0x" + b"f" * 5000, "= a whole number of 20000 bits: must be a finite number"),
        (b"[run]\nseed = " + b"9" * 300, "must be less than"),
        (b"[run]\nsteps" + b".a" * 3000 + b" = 3", "[run] steps = {'a': {'a': {'a': {'a': {...}}}}}: must be"),
        (b"[run]\nsteps = 2026-11-30", "[run] steps = 2026-11-30: must be a valid integer"),
        (b'[run]\n"a\\nb\\u001b" = 1', "[run] a\\nb\\x1b = 1: unknown key"),
        (b'["a\\nb"]', "[a\\nb]: unknown section"),
        (b'[run]\nname = "a\\nb"', "[run] name = 'a\\nb': must hold no line breaks or other control characters"),
        (b'[data]\nfiles = ["a", "\\u2028"]', "must hold no line breaks"),
        (b"[[run]]\nseed = 1", "[run]: [{'seed': 1}]: must be a section"),
        (b"[run]\nname = '" + b"x" * 5000 + b"'", "String should have at most 255 characters"),
        (b"[data]\nfiles = [" + b"1, " * 100000 + b"]", "files[0] = 1: must be a valid string (and 1"),
        (b"[run]\nwarmup_steps = -0.0", "must be a valid integer"),
    ],
)  # fmt: skip
def test_a_config_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "run.toml").write_bytes(content)
    assert said in refusal(tmp_path / "run.toml", read_config)


def test_of_very_many_errors_the_first_are_told(tmp_path):
    (tmp_path / "run.toml").write_text("[run]\n" + "".join(f"key{number} = 1\n" for number in range(1000)))
    with pytest.raises(ConfigError) as refused:
        read_config(tmp_path / "run.toml")
    *lines, last = str(refused.value).split("\n")
    assert len(lines) == 40 and last == "and 960 more errors"


def test_folders_devices_and_names_that_cannot_be(tmp_path):
    assert refusal(tmp_path).endswith("cannot be read: Is a directory")
    assert refusal(tmp_path / "none").endswith("cannot be read: No such file or directory")
    assert "\\n" in refusal(tmp_path / "no\nne")
    assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 5000))
    assert "cannot be read: embedded null byte" in refusal(f"{tmp_path}/a\0b")
    assert "cannot be read: " in refusal(f"{tmp_path}/\udcff\ud800")
    assert read_text("/dev/null") == ""
    assert refusal("/dev/zero", most_bytes=2**20).endswith("cannot be read: more than 1048576 bytes")
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(tmp_path / "loop").endswith("cannot be read: Too many levels of symbolic links")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "secret").write_text("")
    (tmp_path / "secret").chmod(0)
    assert refusal(tmp_path / "secret").endswith("cannot be read: Permission denied")


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path):
    with open(tmp_path / "huge.toml", "wb") as file:
        file.truncate(2**40)
    assert refusal(tmp_path / "huge.toml", read_config).endswith("cannot be read: more than 16777216 bytes")


def test_a_pipe_is_read_and_one_that_nobody_writes_to_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIPE_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").endswith("cannot be read: nothing has come for 0.1 s")
    monkeypatch.setattr(reading, "PIPE_SECONDS", 30.0)
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("words " * 50000,))
    writer.start()
    assert read_text(tmp_path / "pipe") == "words " * 50000
    writer.join()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100000, "not JSON: nested too deeply"),
        ("[" + "9" * 5000 + "]", "not JSON: a whole number has thousands of digits"),
        ("", "not JSON: Expecting value"),
    ],
)
def test_json_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "file.json").write_text(text)
    assert said in refusal(tmp_path / "file.json", read_json)


def test_any_value_is_shown_short_and_on_one_line():
    deep = [[[[[[[]]]]]], {"a\n": {"b": [1] * 99}}]
    for value in ("x" * 10**6, "\n\x1b\udcff\u2028", 10**10000, [10**10000] * 9, deep, b"\n", None):
        assert show_value(value).isprintable() and len(show_value(value)) <= 121
    assert show_value("a") == "'a'" and show_value([1, 2.5, True]) == "[1, 2.5, true]"


def test_a_long_text_keeps_both_ends():
    assert one_line("a" * 700 + "z").startswith("aaa") and one_line("a" * 10**6 + "z").endswith("aaaz")
    assert len(one_line("\n" * 10**6)) <= 321
