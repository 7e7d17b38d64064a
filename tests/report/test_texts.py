"""Texts are shown as they come, whole characters at a time, or written a line each, in the order of their prompts."""

import json

import pytest

from hpcmoe.errors import ConfigError
from hpcmoe.model.continuations import Continuation
from hpcmoe.model.decode import ByteCodec
from hpcmoe.model.prompts import PromptText, encode_prompts
from hpcmoe.report.texts import TextReport


def make_report(*texts, output=""):
    given = [PromptText(text=text, where=f"p, line {number}") for number, text in enumerate(texts, 1)]
    return TextReport(given, encode_prompts(given, ByteCodec(), 99), ByteCodec(), output)


def make_row(report, number, added, reason="length"):
    return Continuation(prompt=report.prompts[number], added=list(added), finish_reason=reason)


def test_a_text_comes_in_whole_characters_and_without_what_a_terminal_obeys(capsys):
    report, added = make_report("caf"), "\xe9 \u20ac\x1b[2J\n".encode() + b"\xff\xe2"
    assert report.streams
    report.start()
    shown = [capsys.readouterr().out]
    for length in range(1, len(added) + 1):
        report.show(make_row(report, 0, added[:length], "length" * (length == len(added))))
        shown.append(capsys.readouterr().out)
    assert shown[:7] == ["caf", "", "\xe9", " ", "", "", "\u20ac"]
    assert "".join(shown) == "caf\xe9 \u20ac\\x1b[2J\n\ufffd\ufffd\n"
    report.add([make_row(report, 0, added)])
    assert capsys.readouterr().out == ""  # it has been shown
    assert report.summarize(2).startswith("1 prompt of 3 tokens, 13 tokens added in ")


def test_texts_of_several_prompts_are_shown_with_their_places(capsys):
    report = make_report("ab", "c")
    assert not report.streams
    report.start()
    report.add([make_row(report, 0, b"!?"), make_row(report, 1, b".", "eos")])
    assert capsys.readouterr().out == "== p, line 1: 2 tokens, length\nab!?\n== p, line 2: 1 tokens, eos\nc.\n"


def test_lines_are_written_as_they_come_and_begin_anew_with_each_run(tmp_path, capsys):
    path = tmp_path / "o.jsonl"
    path.write_text("old\n")
    report = make_report("a", "\xe9", output=str(path))
    report.start()
    report.add([make_row(report, 0, b"\n\xff")])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"prompt": "a", "text": "\n\ufffd", "tokens": [10, 255], "finish_reason": "length"}
    ]
    report.add([make_row(report, 1, b"x", "eos")])
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == ["a", "\xe9"]
    assert capsys.readouterr().out == "" and not make_report("a", output=str(path)).streams


def test_a_file_that_cannot_be_written_is_one_line():
    report = make_report("a", output="/proc/none/o.jsonl")
    with pytest.raises(ConfigError, match="^/proc/none/o.jsonl: cannot be written: No such file or directory$"):
        report.add([make_row(report, 0, b"x")])


class Joining(ByteCodec):
    """A tokenizer that leaves out a space where a text begins, as SentencePiece's do."""

    def decode(self, tokens):
        return super().decode(tokens).lstrip(" ")


def test_a_space_between_prompt_and_text_stays(capsys):
    report = make_report("a", "b")
    report.codec = Joining()
    assert report.cut_added(make_row(report, 0, b" b")) == " b"
