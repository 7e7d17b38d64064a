"""Prompts are read a line each, limited by what the model has left for them, and dealt evenly."""

import json

import pytest

from hpcmoe.errors import ConfigError
from hpcmoe.model.decode import ByteCodec
from hpcmoe.model.prompts import Prompt, PromptText, deal_prompts, encode_prompt, encode_prompts, read_prompts


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_line_is_a_prompt_and_blank_ones_are_none(tmp_path):
    read = read_prompts(write(tmp_path / "p.txt", "\ufeffone \r\n\n   \ntwo\u2028 \xe4"))
    assert [prompt.text for prompt in read] == ["one ", "two\u2028 \xe4"]
    assert [prompt.where.rpartition(", ")[2] for prompt in read] == ["line 1", "line 4"]


def test_an_object_a_line_has_a_text(tmp_path):
    lines = [json.dumps({"text": text, "id": 1}) for text in ("a\nb", "\xe9")]
    assert [p.text for p in read_prompts(write(tmp_path / "p.JSONL", "\n".join(lines)))] == ["a\nb", "\xe9"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "", "holds no prompt: one a line is expected"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"one\n\xff", "not a text file in UTF-8: byte 4 is not"),
        ("p.jsonl", '{"text": "a"}\n{"text"', "p.jsonl, line 2: not JSON:"),
        ("p.jsonl", '{"prompt": "a"}', "line 1: {'prompt': 'a'}: must be an object with a \"text\""),
        ("p.jsonl", '{"text": 1}', "must be an object"),
        ("p.jsonl", "7", "line 1: 7: must be an object"),
        ("p.jsonl", "[" * 100000, "line 1: not JSON:"),
    ],
)
def test_what_is_no_prompt_is_one_line(name, content, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_prompts(write(tmp_path / name, content))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="none.txt: cannot be read: No such file or directory"):
        read_prompts(tmp_path / "none.txt")


class Short(ByteCodec):
    """A model of eight positions."""

    num_positions = 8


def test_a_prompt_is_limited_by_the_positions_that_it_leaves():
    given = [PromptText(text=text, where="p, line 1") for text in ("abc", "abcdefg")]
    assert [prompt.limit for prompt in encode_prompts(given, Short(), 4)] == [4, 1]
    assert [prompt.limit for prompt in encode_prompts(given, ByteCodec(), 4)] == [4, 4]
    with pytest.raises(ConfigError, match="^p, line 1: 8 tokens [+] 1 new one = 9 positions, the model has 8$"):
        encode_prompt(0, PromptText(text="abcdefgh", where="p, line 1"), Short(), 4)
    with pytest.raises(ConfigError, match="^p, line 2: '': has no tokens"):
        encode_prompt(0, PromptText(text="", where="p, line 2"), Short(), 4)


@pytest.mark.parametrize(("num_prompts", "num_ranks"), [(0, 2), (1, 3), (7, 3), (9, 3), (5, 1)])
def test_prompts_are_dealt_evenly_with_their_likes_and_one_to_rank_0(num_prompts, num_ranks):
    prompts = [Prompt(number=n, tokens=(1,) * (1 + 5 * n % 7), limit=1) for n in range(num_prompts)]
    dealt = deal_prompts(prompts, num_ranks)
    assert sorted(p.number for own in dealt for p in own) == list(range(num_prompts))
    counts = [len(own) for own in dealt]
    assert len(counts) == num_ranks and max(counts) - min(counts) <= 1 and counts[0] == max(counts)
    lengths = [len(p.tokens) for own in dealt for p in own]
    assert lengths == sorted(lengths)
