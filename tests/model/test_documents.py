"""Documents come whole, in passages of bounded length, and what is no document is named by file and line or byte."""

import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.errors import ConfigError
from hpcmoe.model import documents
from hpcmoe.model.documents import cut_document, log_formats, read_documents
from hpcmoe.model.files import make_stamp


@pytest.fixture
def read(tmp_path):
    """Read the documents of files that are written as name -> bytes."""

    def read(files, text_field="text"):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        stamps = {str(tmp_path / name): make_stamp((tmp_path / name).stat()) for name in files}
        return join(read_documents(stamps, text_field))

    return read


def join(passages):
    """Join passages to documents; the last one must end."""
    found = [""]
    for passage in passages:
        assert passage.text
        found[-1] += passage.text
        if passage.ends:
            found.append("")
    assert found.pop() == ""
    return found


def line(text, **more):
    """A line of JSON."""
    return json.dumps(more | {"text": text}).encode() + b"\n"


def test_a_plain_file_is_a_document_and_so_is_a_line_of_json(read):
    lines = b"\xef\xbb\xbf" + line("one\ntwo", id=3) + b"\n  \n" + line("") + line("trois é") + line("four").strip()
    assert read({"a.jsonl": lines, "b.txt": b'{"text": "x"}\r\n', "c.NDJSON": line("five")}) == [
        "one\ntwo", "trois é", "four", '{"text": "x"}\r\n', "five",
    ]  # fmt: skip
    assert read({"a.jsonl": line("one")}, "") == ['{"text": "one"}\n']
    assert read({"a.jsonl": b'{"body": "one"}'}, "body") == ["one"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": x', "line 2: no JSON: Expecting value at column 10"),
        (b'{"text": "", "n": ' + b"1" * 5000 + b"}", "line 2: no JSON: Exceeds the limit"),
        (b"", None),
        (b'["text"]', "line 2: ['text']: must be an object with a field 'text'"),
        (b"3", "line 2: 3: must be an object"),
        (b"null", "line 2: null: must be an object"),
        (b'{"text": 3}', "line 2: 'text' = 3: must be a string"),
        (b'{"text": null}', "line 2: 'text' = null: must be a string"),
        (b'{"a": 1, "Text": ""}', "line 2: has no field [data] text_field = 'text'; has 'a', 'Text'"),
        (b"{}", "line 2: has no field [data] text_field = 'text'; has none"),
        (b'{"text": "\xff"}', "line 2: not UTF-8 at byte 10 of the line"),
        (b'{"text": "\\ud800"}', "line 2: 'text' holds half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000, "line 2: JSON nested too deeply"),
        (b'{"a": 1}' * 2, "line 2: no JSON: Extra data at column 9"),
    ],
)
def test_what_is_no_document_is_named_by_file_and_line(read, content, said):
    files = {"a.jsonl": line("fine") + content + b"\n" + line("fine")}
    if said is None:
        assert read(files) == ["fine", "fine"]
        return
    with pytest.raises(ConfigError) as error:
        read(files)
    assert f"a.jsonl, {said}" in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("at", [0, 5, 63, 64, 200])
def test_what_is_not_utf_8_is_named_by_its_byte(read, monkeypatch, at):
    monkeypatch.setattr(documents, "PASSAGE_CHARACTERS", 64)
    content = "é".encode() * 200
    start = at - at % 2
    with pytest.raises(ConfigError, match=rf"a.txt: not UTF-8 at byte {start}: convert it, or leave it out"):
        read({"a.txt": content[:start] + b"\xff" + content})
    with pytest.raises(ConfigError, match="a.txt: not UTF-8 at byte 398"):
        read({"a.txt": content[:-1]})


def test_files_and_a_field_that_do_not_go_together_are_told(caplog):
    log_formats(["a.jsonl", "b.txt"], "text")
    log_formats(["b.txt"], "")
    assert not caplog.messages
    log_formats(["b.txt"], "text")
    log_formats(["a.jsonl", "b.txt", "C.NDJSON"], "")
    assert caplog.messages == [
        "no effect: [data] text_field = 'text': no file is named *.jsonl or *.ndjson",
        '[data] text_field = "": 2 files *.jsonl or *.ndjson are read as plain text, not as JSON',
    ]


def test_a_file_that_changes_while_it_is_read_or_is_gone_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    stamps = {str(tmp_path / "a.txt"): make_stamp((tmp_path / "a.txt").stat())}
    reading = read_documents(stamps, "")
    next(reading)
    (tmp_path / "a.txt").write_text("other text")
    with pytest.raises(ConfigError, match="a.txt: has been written or replaced"):
        next(reading)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match="a.txt: cannot be read: No such file"):
        next(read_documents(stamps, ""))


@given(st.lists(st.text(st.sampled_from("ab_ \n."), max_size=40)), st.integers(1, 12))
def test_passages_are_short_and_begin_after_a_word_where_there_is_one(parts, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PASSAGE_CHARACTERS", most)
        passages = list(cut_document(parts))
    whole = "".join(parts)
    assert "".join(passage.text for passage in passages) == whole
    assert [passage.ends for passage in passages] == [False] * (len(passages) - 1) + [True] * (whole != "")
    start = 0
    for passage in passages:
        text = passage.text
        assert 0 < len(text) <= most
        follows = whole[start + len(text) : start + len(text) + 1]
        if not passage.ends and not (text[-1] in "ab" and follows in " \n"):  # there is no better cut
            window = whole[start : start + most + 1]
            assert not any(a in "ab" and b in " \n" for a, b in zip(window, window[1:], strict=False))
        start += len(text)


def test_long_documents_take_memory_of_a_passage_and_time_in_proportion(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word " * 1_000_000)
    stamps = {str(path): make_stamp(pathlib.Path(path).stat())}
    lengths = [len(passage.text) for passage in read_documents(stamps, "")]
    assert sum(lengths) == 5_000_000 and max(lengths) <= documents.PASSAGE_CHARACTERS and len(lengths) == 39
