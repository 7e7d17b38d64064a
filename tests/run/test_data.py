"""Files are found and split, their bytes read as one text, and each step's sequences dealt to the ranks."""

import pathlib
import sysconfig
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import Cluster, Data
from hpcmoe.errors import ConfigError
from hpcmoe.run.data import (
    Span,
    Split,
    Text,
    check_text,
    draw_starts,
    even_starts,
    expand,
    find_text,
    read_micro_batches,
    share_of,
)
from hpcmoe.wait import gather_to_all

CONTENT = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes()


def write_files(folder, **sizes):
    """Write text files of some bytes: name=size."""
    folder.mkdir(exist_ok=True)
    for name, size in sizes.items():
        (folder / f"{name}.txt").write_bytes(CONTENT[:size])


def find(folder, *patterns, exclude=(), share=0.25, sequence_length=10):
    """Find text in a folder -> (names for training, names for validation)."""
    files = tuple(str(folder / pattern) for pattern in patterns)
    split = find_text(Data(files=files, exclude=tuple(exclude), validation_share=share), sequence_length)
    return tuple(sorted(pathlib.Path(span.path).stem for span in part) for part in (split.training, split.validation))


def test_files_are_split_whole_by_share(tmp_path):
    write_files(tmp_path, a=30, b=40, c=50, d=60, e=70, f=80, g=90, h=100)
    training, validation = find(tmp_path, "*.txt")
    assert sorted(training + validation) == list("abcdefgh") and len(validation) == 2
    split = find_text(Data(files=(str(tmp_path / "*.txt"),), exclude=()), 10)
    assert all(s.first == 0 and s.length == pathlib.Path(s.path).stat().st_size for s in split.training)


def test_the_split_depends_on_the_files_names_alone(tmp_path):
    names = {f"file{number}": 50 for number in range(20)}
    write_files(tmp_path / "here", **names)
    write_files(tmp_path / "there", **names)
    assert find(tmp_path / "here", "*.txt") == find(tmp_path / "there", "*.txt", "file*")


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_two_files_are_one_for_each_whatever_the_share(tmp_path, share):
    write_files(tmp_path, a=50, b=50)
    assert [len(part) for part in find(tmp_path, "*.txt", share=share)] == [1, 1]


def test_a_single_file_is_split_by_bytes(tmp_path):
    write_files(tmp_path, a=100)
    split = find_text(Data(files=(str(tmp_path / "a.txt"),), exclude=(), validation_share=0.25), 10)
    path = str(tmp_path / "a.txt")
    assert split.training == (Span(path=path, first=0, length=75),)
    assert split.validation == (Span(path=path, first=75, length=25),)
    assert Text(split.validation).read(0, 25).tobytes() == CONTENT[75:100]


def test_what_is_excluded_empty_a_folder_or_named_twice_counts_as_it_should(tmp_path):
    write_files(tmp_path, a=50, b=50, c=50, empty=0)
    write_files(tmp_path / "folder.txt", d=50)
    training, validation = find(tmp_path, "*.txt", "a.txt", "*/*.txt", exclude=["*/b.*"])
    assert sorted(training + validation) == ["a", "c", "d"]


def test_stdlib_is_pythons_own_library():
    assert str(pathlib.Path(sysconfig.get_path("stdlib"), "ast.py")) in expand("{stdlib}/*.py", ())
    split = find_text(Data(), 64)
    assert sum(span.length for span in split.training) > 5_000_000
    assert not any("site-packages" in span.path or "/test/" in span.path for span in split.training)


@pytest.mark.parametrize(
    ("patterns", "exclude", "said"),
    [
        (["none*.txt"], [], "no file with text matches"),
        (["*.txt"], ["*.txt"], "no file with text matches"),
        (["empty.txt"], [], "no file with text matches"),
        (["a.txt", "none.txt"], [], "none.txt: no such file"),
        (["a.txt"], [], "1 files for training hold 12 bytes, one sequence takes [model] sequence_length + 1 = 13"),
        (["a.txt", "b.txt"], [], "bytes, one sequence takes [model] sequence_length + 1 = 13"),
    ],
)
def test_text_that_is_not_there_or_too_short_is_refused_in_one_line(tmp_path, patterns, exclude, said):
    write_files(tmp_path, a=16, b=12, empty=0)
    with pytest.raises(ConfigError) as refused:
        find(tmp_path, *patterns, exclude=exclude, sequence_length=12)
    assert str(refused.value).startswith("[data] files") and said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_text_of_exactly_one_sequence_is_enough(tmp_path):
    write_files(tmp_path, a=13, b=13)
    training, validation = find(tmp_path, "*.txt", sequence_length=12)
    assert sorted([training, validation]) == [["a"], ["b"]]


def test_a_rank_that_does_not_see_a_file_whole_says_so(tmp_path):
    write_files(tmp_path, a=50, b=50)
    spans = [Span(path=str(tmp_path / f"{name}.txt"), first=10, length=40) for name in "ab"]
    split = Split(training=(spans[0],), validation=(spans[1],))
    check_text(split)
    write_files(tmp_path, b=49)
    with pytest.raises(
        ConfigError, match=r"^\[data\] files: .*b.txt: rank 0 found it, this rank does not see it whole$"
    ):
        check_text(split)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match="a.txt"):
        check_text(split)


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_bytes(CONTENT)
    return str(path)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 100)), min_size=1, max_size=6), st.data())
def test_reading_across_files_is_reading_their_bytes_joined(long_file, places, data):
    text = Text([Span(path=long_file, first=first, length=length) for first, length in places])
    whole = b"".join(CONTENT[first : first + length] for first, length in places)
    assert len(text) == len(whole)
    start = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(1, len(whole) - start))
    assert text.read(start, length).tobytes() == whole[start : start + length]


def test_a_sequence_comes_with_its_next_byte(long_file):
    rows = Text([Span(path=long_file, first=0, length=500)]).sequences(np.array([0, 493]), 6)
    assert rows.dtype == np.uint8 and [row.tobytes() for row in rows] == [CONTENT[:7], CONTENT[493:]]
    assert Text([]).sequences(np.array([], int), 6).shape == (0, 7)


def test_starts_are_drawn_anew_each_step_and_reach_the_last_byte():
    starts = [draw_starts(20, 200, 6, seed, step) for seed in range(2) for step in range(2)]
    for index, drawn in enumerate(starts):
        assert set(drawn) == set(range(14))  # 13 + 6 is the last byte
        assert not any(np.array_equal(drawn, other) for other in starts[:index])
    assert np.array_equal(starts[3], draw_starts(20, 200, 6, 1, 1))
    assert draw_starts(7, 3, 6, 0, 0).tolist() == [0, 0, 0]


def test_validation_starts_spread_from_the_first_to_the_last():
    assert even_starts(20, 5, 6).tolist() == [0, 3, 6, 9, 13]
    assert even_starts(7, 2, 6).tolist() == [0, 0]


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_nearly_equal_and_cover_all_once(num_items, num_shares):
    items = np.arange(num_items)
    shares = [items[share_of(num_items, index, num_shares)] for index in range(num_shares)]
    assert np.concatenate(shares).tolist() == items.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 16])
def test_a_micro_batch_is_the_same_at_any_number_of_ranks(long_file, num_ranks):
    text, starts = Text([Span(path=long_file, first=0, length=500)]), draw_starts(500, 13, 6, 0, 1)
    of_ranks = [
        read_micro_batches(text, starts, 6, 3, SimpleNamespace(token_index=rank, num_token_shares=num_ranks))
        for rank in range(num_ranks)
    ]
    whole = [text.sequences(starts[begin:end], 6) for begin, end in ((0, 4), (4, 8), (8, 13))]
    for number, expected in enumerate(whole):
        assert np.array_equal(np.concatenate([batches[number] for batches in of_ranks]), expected)


@pytest.mark.mpi
def test_every_rank_reads_a_share_of_its_own_at_any_parallel_sizes(comm, tmp_path):
    (tmp_path / "long.txt").write_bytes(CONTENT)
    text = Text([Span(path=str(tmp_path / "long.txt"), first=0, length=500)])
    starts = np.arange(13) * 7
    tensor_parallel = 2 - comm.size % 2
    with open_mesh(comm, Cluster(tensor_parallel=tensor_parallel)) as mesh:
        (batch,) = read_micro_batches(text, starts, 6, 1, mesh)
        assert np.array_equal(np.concatenate(gather_to_all(mesh.world, batch)), text.sequences(starts, 6))
