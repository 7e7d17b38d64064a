"""Text is found and split, its bytes read as one text that must stay as it was, and each step's sequences dealt."""

import logging
import os
import pathlib
import resource
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.config import DataConfig, ParallelConfig
from hpcmoe.errors import ConfigError
from hpcmoe.model.split import Span, Split
from hpcmoe.model.text import (
    MOST_OPEN,
    BlankText,
    Text,
    check_text,
    draw_starts,
    even_starts,
    find_text,
    read_micro_batches,
    share_of,
)
from hpcmoe.wait import gather_to_all

CONTENT = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes()


def read(text, start, length):
    """Read bytes start, start + 1, ... of a text."""
    return text.sequences(np.array([start]), length - 1)[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(**sizes):
    """Write text files of some bytes: name=size."""
    for name, size in sizes.items():
        pathlib.Path(f"{name}.txt").write_bytes(CONTENT[:size])


def find(*patterns, share=0.25, sequence_length=10, **more):
    """Find and split text."""
    return find_text(DataConfig(files=patterns, exclude=(), validation_share=share), sequence_length, **more)


def test_both_sizes_are_in_the_log(here, caplog):
    write(a=30, b=40, c=50, d=60, e=70, f=80, g=90, h=100)
    with caplog.at_level(logging.INFO):
        split = find("*.txt")
        find("h.txt")
    num_bytes = [sum(span.length for span in part) for part in (split.training, split.validation)]
    counts = len(split.training), len(split.validation)
    assert num_bytes == [390, 130] and sum(counts) == 8
    assert caplog.messages == [
        f"text: training {counts[0]} files, 390 B; validation {counts[1]} files, 130 B",
        "text: training 1 file, 75 B; validation 1 file, 25 B",
    ]


def test_no_byte_is_in_training_and_in_validation(here):
    write(a=100)
    os.link("a.txt", "b.txt")
    os.symlink("a.txt", "c.txt")
    split = find("a.txt", "*.txt", "./b.txt", f"{here}/**")
    assert [span.length for span in split.training + split.validation] == [75, 25]
    assert read(Text(split.training), 0, 75).tobytes() + read(Text(split.validation), 0, 25).tobytes() == CONTENT[:100]


def test_the_runs_own_folder_is_no_text(here):
    write(a=100, b=100)
    os.makedirs("out/run")
    os.rename("b.txt", "out/run/b.txt")
    assert len(find("**").training) == 1 and find("**", own_folder="out/run").validation[0].path == "a.txt"


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["none*.txt"], "no file with text matches; none*.txt matches nothing"),
        (["empty.txt"], "no file with text matches; empty.txt matches 1 empty"),
        (["a.txt", "none.txt"], "none.txt: no such file"),
        (["a.txt"], "1 files for training hold 12 bytes, one sequence takes [model] sequence_length + 1 = 13"),
        (["a.txt", "b.txt"], "bytes, one sequence takes [model] sequence_length + 1 = 13"),
    ],
)
def test_text_that_is_not_there_or_too_short_is_refused_in_one_line(here, patterns, said):
    write(a=16, b=12, empty=0)
    with pytest.raises(ConfigError) as caught:
        find(*patterns, sequence_length=12)
    assert str(caught.value).startswith("[data] files") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_of_exactly_one_sequence_is_enough(here):
    write(a=13, b=13)
    split = find("*.txt", sequence_length=12)
    assert sorted(span.path for span in split.training + split.validation) == ["a.txt", "b.txt"]


def test_a_rank_that_does_not_see_a_file_as_rank_0_does_says_so(here):
    write(a=50, b=50)
    split = find("*.txt")
    assert check_text(split) == split
    pathlib.Path("b.txt").write_bytes(CONTENT[100:150])
    with pytest.raises(ConfigError, match=r"^\[data\] files: b.txt: this rank reads other bytes than rank 0$"):
        check_text(split)
    write(b=50)
    without_stamps = Split(training=(Span(path="a.txt", first=10, length=40),), validation=())
    assert check_text(without_stamps).training[0].stamp.size == 50
    for size in (49, 51, 0):
        write(b=size)
        with pytest.raises(
            ConfigError, match=rf"^\[data\] files: b.txt: rank 0 found 50 bytes, .* whole: {size} bytes$"
        ):
            check_text(split)
    os.unlink("b.txt")
    with pytest.raises(ConfigError, match=r"^\[data\] files: b.txt: rank 0 found it, this rank does not see it$"):
        check_text(split)
    os.mkfifo("b.txt")
    with pytest.raises(ConfigError, match=r"^\[data\] files: b.txt: rank 0 found 50 bytes"):
        check_text(split)


def test_a_file_that_may_not_be_read_is_named(here):
    write(a=50, b=50)
    os.chmod("b.txt", 0)
    here.chmod(0o755)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read all
    try:
        with pytest.raises(ConfigError, match=r"^\[data\] files: b.txt: cannot be read: Permission denied$"):
            check_text(find("*.txt"))
    finally:
        os.seteuid(user)


CHANGES = {
    "cut": (lambda path: os.truncate(path, 3), "has 3 bytes, had 100 when the run began"),
    "emptied": (lambda path: path.write_bytes(b""), "has 0 bytes, had 100 when the run began"),
    "appended to": (lambda path: path.write_bytes(CONTENT[:101]), "has 101 bytes, had 100 when the run began"),
    "written": (lambda path: path.write_bytes(CONTENT[100:200]), "has been written or replaced since the run began"),
    "replaced": (lambda path: replace(path), "has been written or replaced since the run began"),
    "removed": (lambda path: path.unlink(), "is gone since the run began"),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("none")), "is gone since the run began"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "bytes, had 100 when the run began"),
}


def replace(path):
    """Put another file of the same size in the place of one."""
    other = path.with_name("other")
    other.write_bytes(CONTENT[100:200])
    os.utime(other, ns=(0, 0))
    other.rename(path)


@pytest.mark.parametrize("name", ["plain.txt", "x\udcff\n.txt"], ids=["plain", "no UTF-8"])
@pytest.mark.parametrize("was_read", [False, True], ids=["never read", "read"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_under_a_run_is_one_line_that_names_it(here, change, was_read, name):
    path, (alter, said) = pathlib.Path(name), CHANGES[change]
    path.write_bytes(CONTENT[:100])
    os.utime(path, ns=(10**18, 10**18))
    text = Text(check_text(find("*.txt")).training)
    if was_read:
        read(text, 0, 75)
    alter(path)
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            read(text, 60, 10)
        line = str(caught.value)
        assert line.isprintable() and line.startswith(f"[data] files: {name.encode('unicode_escape').decode()}: ")
        assert line.endswith(said) or change == "a folder" and "Is a directory" in line


def test_a_file_that_gets_another_link_or_mode_or_is_read_has_not_changed(here):
    write(a=100)
    text = Text(check_text(find("a.txt")).training)
    os.link("a.txt", "b.txt")
    os.chmod("a.txt", 0o400)
    assert read(text, 0, 75).tobytes() == CONTENT[:75]


def test_a_text_of_many_files_keeps_few_open_and_closes_them(here):
    os.mkdir("many")
    for number in range(300):
        pathlib.Path(f"many/{number:03d}").write_bytes(CONTENT[number : number + 2])
    text = Text([Span(path=f"many/{number:03d}", first=0, length=2) for number in range(300)])
    before, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + MOST_OPEN + 8, limits[1]))
    try:
        whole = read(text, 0, 600).tobytes()
        assert len(os.listdir("/proc/self/fd")) == before + MOST_OPEN
        assert text.sequences(np.array([0, 4, 0]), 5).shape == (3, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert whole == b"".join(CONTENT[number : number + 2] for number in range(300))
    del text
    assert len(os.listdir("/proc/self/fd")) == before


def test_blank_text_has_the_shape_of_what_it_stands_for(here):
    write(a=100)
    text, mesh = Text(find("a.txt").training), SimpleNamespace(token_index=1, num_token_shares=3)
    real, blank = (read_micro_batches(each, np.arange(14), 5, 4, mesh) for each in (text, BlankText()))
    assert [(one.shape, one.dtype) for one in real] == [(other.shape, other.dtype) for other in blank]


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
    assert read(text, start, length).tobytes() == whole[start : start + length]


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
    with open_mesh(comm, ParallelConfig(tensor=tensor_parallel)) as mesh:
        (batch,) = read_micro_batches(text, starts, 6, 1, mesh)
        assert np.array_equal(np.concatenate(gather_to_all(mesh.world, batch)), text.sequences(starts, 6))
