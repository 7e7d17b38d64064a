"""Text is encoded once, split by documents, and read as packed sequences, the same on any number of ranks."""

import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import DataConfig, ParallelConfig
from hpcmoe.errors import ConfigError, on_all, on_root
from hpcmoe.model import encoded
from hpcmoe.model.encoding import TOKEN, ByteEncoder, TokenEncoder
from hpcmoe.model.text import Text, check_text, even_starts, read_micro_batches
from hpcmoe.model.tokens import TokenText, find_encoded, find_tokens, make_span, unpack_documents
from hpcmoe.wait import gather_to_all

END = 7
SOURCE = "".join(f"def jump_{n}(fox):\n\n\n    return fox.jumps + {n**3}  # it's déjà vu ...\n\n" for n in range(60))


class Letters:
    """Encodes each letter as its code plus 1000, and counts the texts that it is given."""

    dtype, unit, end, identity = TOKEN, "tokens", END, "letters"

    def __init__(self):
        self.num_texts = 0

    def encode(self, texts):
        self.num_texts += len(texts)
        return [np.array([1000 + ord(letter) for letter in text], TOKEN) for text in texts]


@pytest.fixture
def data(tmp_path):
    """Forty documents of unlike lengths in a file of JSON lines -> DataConfig."""
    texts = [chr(ord("a") + number % 26) * (1 + number * 7 % 40) for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    (tmp_path / "run").mkdir()
    return DataConfig(files=(str(tmp_path / "a.jsonl"),), exclude=(), text_field="body", validation_share=0.2)


def read_all(spans):
    """Read a part whole -> its documents as strings."""
    text = TokenText(spans)
    tokens = text.sequences(np.array([0]), len(text) - 1)[0]
    assert tokens.dtype == np.int64 and tokens[-1] == END
    return "".join("|" if token == END else chr(token - 1000) for token in tokens.tolist()).split("|")[:-1]


def make_text(tmp_path, tokens):
    """Write tokens to a file -> TokenText."""
    np.asarray(tokens, TOKEN).tofile(tmp_path / "tokens")
    return TokenText([make_span(tmp_path / "tokens")])


def test_whole_documents_are_for_training_or_for_validation(data, tmp_path):
    split = find_encoded(data, Letters(), 10, tmp_path / "run")
    training, validation = read_all(split.training), read_all(split.validation)
    texts = [json.loads(line)["body"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [text for text in texts if text in training] == training  # in the order of the file
    assert sorted(training + validation) == sorted(texts) and not set(training) & set(validation)
    total = sum(len(text) + 1 for text in texts)
    assert sum(len(text) + 1 for text in validation) == pytest.approx(0.2 * total, abs=1)
    assert [path.name for path in sorted((tmp_path / "run" / "encoded_text").iterdir())] == [
        "text.json",
        "training",
        "validation",
    ]


def test_a_single_document_is_cut(data, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "abcdefghi"}))
    split = find_encoded(data, Letters(), 3, tmp_path / "run")
    first = TokenText(split.training)
    assert first.sequences(np.array([0]), 5)[0].tolist() == [1000 + ord(letter) for letter in "abcdef"]
    assert len(first) == 6 and read_all(split.validation) == ["ghi"]  # which takes 4 tokens at least


def test_documents_longer_than_a_passage_stay_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr("hpcmoe.model.documents.PASSAGE_CHARACTERS", 5)
    monkeypatch.setattr(encoded, "_BATCH_CHARACTERS", 12)
    split = find_encoded(data, letters := Letters(), 10, tmp_path / "run")
    texts = [json.loads(line)["body"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert sorted(read_all(split.training) + read_all(split.validation)) == sorted(texts)
    assert letters.num_texts == sum(-(-len(text) // 5) for text in texts)


def test_what_the_runs_folder_holds_is_encoded_no_second_time_unless_it_is_other_text(data, tmp_path):
    run = tmp_path / "run"
    find_encoded(data, letters := Letters(), 10, run)
    same = Letters()
    assert find_encoded(data, same, 10, run) == find_encoded(data, letters, 10, run)
    assert same.num_texts == 0 and letters.num_texts == 40

    # Encode anew what differs, or is not whole.
    other, changed = Letters(), []
    other.identity = "other letters"
    os.truncate(run / "encoded_text" / "training", 8)
    changed.append(lambda: find_encoded(data, letters, 10, run))
    changed.append(lambda: find_encoded(data, other, 10, run))
    changed.append(lambda: find_encoded(data, letters, 11, run))
    changed.append(lambda: find_encoded(dataclasses.replace(data, validation_share=0.3), letters, 11, run))
    for encode in changed:
        letters.num_texts = other.num_texts = 0
        encode()
        assert letters.num_texts + other.num_texts == 40
    for content in (b"", b"[]", b'{"hash": 3}'):
        (run / "encoded_text" / "text.json").write_bytes(content)
        letters.num_texts = 0
        find_encoded(data, letters, 10, run)
        assert letters.num_texts == 40
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"body": "new"}')
    assert "new" in "".join(read_all(find_encoded(data, letters, 10, run).training))


def test_too_little_text_is_one_line_with_the_arithmetic_and_leaves_no_text(data, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "abc"}\n{"body": "defg"}\n')
    with pytest.raises(ConfigError) as error:
        find_encoded(data, Letters(), 8, tmp_path / "run")
    assert str(error.value) == (
        "[data] files: 2 documents hold 9 tokens, 9 for training and 0 for validation; one sequence takes [model] "
        "sequence_length + 1 = 9"
    )
    assert list((tmp_path / "run" / "encoded_text").iterdir()) == []
    (tmp_path / "a.jsonl").write_text('{"body": ""}\n\n')
    with pytest.raises(ConfigError, match="0 documents hold 0 bytes, 0 for training and 0 for validation"):
        find_encoded(data, ByteEncoder(), 8, tmp_path / "run")


def test_a_folder_that_takes_no_text_is_one_line(data, tmp_path):
    (tmp_path / "run" / "encoded_text").write_text("in the way")
    with pytest.raises(ConfigError, match=r"run/encoded_text: encoded text cannot be kept: File exists"):
        find_encoded(data, Letters(), 8, tmp_path / "run")


def test_sequences_of_tokens_are_packed_without_gaps_and_each_has_its_next_token(tmp_path):
    text = make_text(tmp_path, np.arange(2**32 - 48, 2**32))
    assert len(text) == 48
    assert text.sequences(np.array([0, 37]), 10).tolist() == [
        list(range(2**32 - 48, 2**32 - 37)), list(range(2**32 - 11, 2**32))
    ]  # fmt: skip
    assert text.sequences(np.array([], np.int64), 10).shape == (0, 11)
    epoch = np.concatenate([text.draw(2, 10, 0, step) for step in (1, 2)])
    assert sorted(epoch.tolist()) == [0, 10, 20, 30]  # 40 to 49 would need the token after the last
    assert sorted(make_text(tmp_path, range(41)).draw(4, 10, 5, 3).tolist()) == [0, 10, 20, 30]
    assert make_text(tmp_path, range(11)).draw(3, 10, 5, 3).tolist() == [0, 0, 0]


def test_a_text_of_bytes_draws_anywhere(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    text = Text([make_span(tmp_path / "a")])
    assert (np.unique(text.draw(200, 10, 0, 1) % 10).tolist()) == list(range(10))


@pytest.mark.mpi
def test_every_rank_reads_its_own_of_the_same_batch(comm, shared):
    folder, num_sequences = shared, 7
    if comm.rank == 0:
        (folder / "a.txt").write_text("".join(map(chr, range(32, 127))) * 9)
        (folder / "run").mkdir()
    data = DataConfig(files=(str(folder / "a.txt"),), exclude=())
    split = on_root(comm, lambda: find_encoded(data, Letters(), 16, folder / "run"))
    text = TokenText(on_all(comm, lambda: check_text(split)).training)
    with open_mesh(comm, ParallelConfig()) as mesh:
        for step in (1, 5):
            starts = text.draw(num_sequences, 16, 3, step)
            batches = gather_to_all(comm, read_micro_batches(text, starts, 16, 2, mesh))
            whole = np.concatenate([rank[number] for number in range(2) for rank in batches])
            assert np.array_equal(whole, text.sequences(starts, 16)) and len(whole) == num_sequences
        of_validation = TokenText(split.validation)
        assert len(of_validation.sequences(even_starts(len(of_validation), 5, 16), 16)) == 5


@pytest.mark.mpi
def test_documents_of_json_lines_become_bytes_that_all_ranks_read(comm, shared):
    if comm.rank == 0:
        (shared / "a.jsonl").write_text('{"text": "aé"}\n' * 20)
        (shared / "run").mkdir()
    data = DataConfig(files=(str(shared / "a.jsonl"),), exclude=(), text_field="text")
    split = unpack_documents(comm, data, 7, shared / "run")
    text = Text(split.training)
    assert len(text) == 18 * 4 and bytes(text.sequences(np.array([4]), 7)[0]) == "aé\naé\n".encode()
    assert all(gather_to_all(comm, pathlib.Path(span.path).exists()) for span in split.training)
    assert unpack_documents(comm, dataclasses.replace(data, text_field=""), 7, shared / "run") is None
    with pytest.raises(ConfigError, match="line 1: has no field"):
        unpack_documents(comm, dataclasses.replace(data, text_field="body"), 7, shared / "run")


# A checkpoint's tokenizer.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with the tokenizer of bytes and some pairs of them."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SOURCE], trainer)
    folder = tmp_path_factory.mktemp("checkpoint")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>", model_max_length=16
    ).save_pretrained(folder)
    return folder


def change_tokenizer(checkpoint, folder, **keys):
    """Copy a tokenizer with other keys in its config -> folder."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text()) | keys
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_documents_are_encoded_as_the_checkpoints_tokenizer_does(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("hpcmoe.model.documents.PASSAGE_CHARACTERS", 300)
    from transformers import AutoTokenizer

    (tmp_path / "a.txt").write_text(SOURCE)
    (tmp_path / "b.txt").write_text("<s>déjà vu<end>")
    (tmp_path / "run").mkdir()
    data = DataConfig(files=(str(tmp_path / "?.txt"),), exclude=())
    split = find_tokens(data, checkpoint, 4, tmp_path / "run", 300)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for spans, text in ((split.training, SOURCE), (split.validation, "<s>déjà vu<end>")):
        tokens = TokenText(spans)
        expected = [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], 1]
        assert tokens.sequences(np.array([0]), len(tokens) - 1)[0].tolist() == expected
    assert len(SOURCE) > 10 * 300 and len(TokenText(split.training)) < len(SOURCE) / 2


def test_a_tokenizer_that_does_not_fit_is_one_line(checkpoint, tmp_path):
    def refusal(folder, vocabulary_size=300):
        with pytest.raises(ConfigError) as error:
            TokenEncoder(folder, vocabulary_size).encode(["text"])
        assert str(error.value).startswith(f"{folder}: its tokenizer") and str(error.value).isprintable()
        return str(error.value)

    assert refusal(tmp_path / "none").endswith("no such folder")
    assert "cannot be read: " in refusal(tmp_path)
    assert refusal(checkpoint, 1).endswith("makes token 1, its model's config.json has vocab_size = 1")
    assert "its model's config.json has vocab_size = 50" in refusal(checkpoint, 50)
    assert refusal(change_tokenizer(checkpoint, tmp_path / "endless", eos_token=None)).endswith(
        "to end a document with"
    )
    (change_tokenizer(checkpoint, tmp_path / "damaged") / "tokenizer.json").write_text('{"model": 3}')
    assert "cannot be read: " in refusal(tmp_path / "damaged")


def test_no_code_of_a_checkpoint_runs(checkpoint, tmp_path):
    trap = tmp_path / "trap"
    keys = {"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}}
    folder = change_tokenizer(checkpoint, tmp_path / "remote", **keys)
    (folder / "trap.py").write_text(f"open({str(trap)!r}, 'w')\nclass Trap: pass\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "trap"} | keys))
    with pytest.raises(ConfigError, match="cannot be read: "):
        TokenEncoder(folder, 300)
    assert not trap.exists()
