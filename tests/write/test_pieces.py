"""What ranks write in pieces, any ranks read in any other pieces, or learn in one line what is not whole."""

import itertools
import os
import pathlib
import shutil

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from hpcmoe import replacing
from hpcmoe.errors import CheckpointError, on_all
from hpcmoe.write import checksums, pieces
from hpcmoe.write.boxes import Piece, PieceSpec, check_tiling
from hpcmoe.write.pieces import read_pieces, write_pieces

SHAPE = (7, 6, 10)  # no axis divides by 2, 3 and 4 alike
WHOLE = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def span(length, rank, size):
    """Split a length as evenly as goes -> start, stop of a rank."""
    return length * rank // size, length * (rank + 1) // size


def split(axis, rank, size):
    """Cut WHOLE along an axis -> this rank's index."""
    index = [slice(0, length) for length in SHAPE]
    index[axis] = slice(*span(SHAPE[axis], rank, size))
    return tuple(index)


def make_piece(index, whole=WHOLE, name="experts/layer0/w1"):
    return Piece(name=name, shape=whole.shape, start=tuple(side.start for side in index), array=whole[index])


def make_part(index, name="experts/layer0/w1", shape=SHAPE, **more):
    extent = tuple(side.stop - side.start for side in index)
    return PieceSpec(name=name, shape=shape, start=tuple(side.start for side in index), extent=extent, **more)


def everything(array):
    return tuple(slice(0, length) for length in array.shape)


def write_whole(comm, folder, **metadata):
    """Write WHOLE, split over the ranks along its first axis."""
    write_pieces(comm, folder, [make_piece(split(0, comm.rank, comm.size))], metadata)


def error_of(call):
    with pytest.raises(CheckpointError) as error:
        call()
    assert error.value.shared and "\n" not in str(error.value)
    return str(error.value)


def test_metadata_come_back(comm, tmp_path):
    metadata = {"step": 120, "loss": 2.5, "kind": "swiglu", "placement": np.array([[0, 1], [2, 3]])}
    write_pieces(comm, tmp_path / "a", [], metadata)
    arrays, back = read_pieces(comm, tmp_path / "a", [])
    assert arrays == {} and back.keys() == metadata.keys()
    np.testing.assert_array_equal(back.pop("placement"), metadata.pop("placement"))
    assert back == metadata and type(back["step"]) is int


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16", "int64", "uint8"])
def test_every_dtype(comm, tmp_path, dtype):
    whole = np.random.default_rng(0).integers(0, 250, (3, 5)).astype(dtype)
    write_pieces(comm, tmp_path / "a", [make_piece(everything(whole), whole, "x")], {})
    part = make_part(everything(whole), "x", whole.shape)
    arrays, _ = read_pieces(comm, tmp_path / "a", [part])
    assert arrays["x", (0, 0)].dtype == dtype
    np.testing.assert_array_equal(arrays["x", (0, 0)], whole)


def test_piece_need_not_be_contiguous(comm, tmp_path):
    whole = WHOLE.transpose(2, 0, 1)[::-1]
    write_pieces(comm, tmp_path / "a", [make_piece(everything(whole), whole)], {})
    arrays, _ = read_pieces(comm, tmp_path / "a", [make_part(everything(whole), shape=whole.shape)])
    np.testing.assert_array_equal(arrays["experts/layer0/w1", (0, 0, 0)], whole)


@given(
    cuts=st.tuples(*(st.lists(st.integers(1, length - 1), max_size=3, unique=True) for length in SHAPE)), data=st.data()
)
def test_any_grid_is_read_by_any_box(tmp_path_factory, cuts, data):
    edges = [sorted({0, *inner, length}) for inner, length in zip(cuts, SHAPE, strict=True)]
    grid = itertools.product(*(itertools.starmap(slice, itertools.pairwise(edge)) for edge in edges))
    folder = tmp_path_factory.mktemp("pieces") / "a"
    write_pieces(MPI.COMM_SELF, folder, [make_piece(index) for index in grid], {})

    ends = [sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length)))) for length in SHAPE]
    box = tuple(slice(*end) for end in ends)
    arrays, _ = read_pieces(MPI.COMM_SELF, folder, [make_part(box)])
    np.testing.assert_array_equal(arrays["experts/layer0/w1", tuple(side.start for side in box)], WHOLE[box])


def test_file_of_that_name_elsewhere_is_not_taken(comm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_whole(comm, tmp_path / "a")
    write_pieces(comm, tmp_path / "b", [make_piece(everything(WHOLE), -WHOLE)], {})
    (tmp_path / "b" / "rank0000.h5").rename(tmp_path / "rank0000.h5")
    arrays, _ = read_pieces(comm, (tmp_path / "a").relative_to(tmp_path), [make_part(everything(WHOLE))])
    np.testing.assert_array_equal(arrays["experts/layer0/w1", (0, 0, 0)], WHOLE)


def test_folder_can_be_moved(comm, tmp_path):
    write_whole(comm, tmp_path / "a")
    (tmp_path / "x").mkdir()
    (tmp_path / "a").rename(tmp_path / "x" / "b")
    arrays, _ = read_pieces(comm, tmp_path / "x" / "b", [make_part(everything(WHOLE))])
    np.testing.assert_array_equal(arrays["experts/layer0/w1", (0, 0, 0)], WHOLE)


def test_folder_of_that_name_is_replaced(comm, tmp_path):
    write_pieces(comm, tmp_path / "a", [], {"course": 1})
    write_pieces(comm, tmp_path / "a", [], {"course": 2})
    assert read_pieces(comm, tmp_path / "a", [])[1] == {"course": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_all_is_on_the_disk_before_the_folder_has_its_name(comm, tmp_path, monkeypatch):
    order, sync, rename = [], pieces.sync, pathlib.Path.rename
    for module in (pieces, checksums, replacing):
        monkeypatch.setattr(module, "sync", lambda path: (order.append(path.name), sync(path)))
    monkeypatch.setattr(pathlib.Path, "rename", lambda path, to: (order.append("named"), rename(path, to))[1])
    write_whole(comm, tmp_path / "a")
    assert order == ["rank0000.h5", "master.h5", "SHA256SUMS", "a.partial", "named", tmp_path.name]


def test_a_folder_loses_its_name_before_its_files(tmp_path, monkeypatch):
    folder, rmtree, there = tmp_path / "checkpoint-2", shutil.rmtree, []
    (folder / "inside").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (there.append(folder.exists()), rmtree(path, **how)))
    replacing.remove_folder(folder)
    assert not there[-1] and list(tmp_path.iterdir()) == []


def test_missing_file(comm, tmp_path):
    write_whole(comm, tmp_path / "a")
    (tmp_path / "a" / "rank0000.h5").unlink()
    assert error_of(lambda: read_pieces(comm, tmp_path / "a", [])) == f"{tmp_path}/a/rank0000.h5 is missing"


def test_torn_file(comm, tmp_path):
    write_whole(comm, tmp_path / "a")
    path = tmp_path / "a" / "rank0000.h5"
    size = path.stat().st_size
    os.truncate(path, 1000)
    message = f"{path} is 1000 bytes, {size} were written"
    assert error_of(lambda: read_pieces(comm, tmp_path / "a", [])) == message


def test_missing_or_damaged_master(comm, tmp_path):
    assert error_of(lambda: read_pieces(comm, tmp_path / "none", [])) == f"{tmp_path}/none/master.h5 is missing"
    write_whole(comm, tmp_path / "a")
    master = tmp_path / "a" / "master.h5"
    os.truncate(master, master.stat().st_size // 2)
    assert error_of(lambda: read_pieces(comm, tmp_path / "a", [])).startswith(f"{master}: cannot be read: ")
    with h5py.File(master, "w") as other:
        other["x"] = 1
    assert "not one of this program's" in error_of(lambda: read_pieces(comm, tmp_path / "a", []))


def test_unknown_name(comm, tmp_path):
    write_whole(comm, tmp_path / "a")
    for name in ("experts/layer9/w1", "experts/layer0"):
        wanted = [make_part(everything(WHOLE), name)]
        message = error_of(lambda wanted=wanted: read_pieces(comm, tmp_path / "a", wanted))
        assert f"checkpoint has no {name}, this model wants it [7, 6, 10]" in message


def test_other_shape_names_both_and_the_keys(comm, tmp_path):
    write_whole(comm, tmp_path / "a")
    keys = ("[model] num_experts", "[model] hidden", "[model] feed_forward")
    for shape, named in (
        ((8, 6, 10), ": [model] num_experts"),
        ((7, 8, 12), ": [model] hidden, [model] feed_forward"),
        ((7, 6), ""),
    ):
        part = PieceSpec(name="experts/layer0/w1", shape=shape, start=(0,) * len(shape), extent=shape, keys=keys)
        message = error_of(lambda part=part: read_pieces(comm, tmp_path / "a", [part]))
        assert message.endswith(f"has experts/layer0/w1 [7, 6, 10], this model wants {list(shape)}{named}")


def test_other_dtype(comm, tmp_path):
    write_whole(comm, tmp_path / "a")
    wanted = [make_part(everything(WHOLE), dtype="uint16")]
    message = error_of(lambda: read_pieces(comm, tmp_path / "a", wanted))
    assert message.endswith("has experts/layer0/w1 as float32, this model wants uint16")
    read_pieces(comm, tmp_path / "a", [make_part(everything(WHOLE), dtype="float32")])


def test_tiling():
    def check(*indexes):
        check_tiling("x", [make_part(index, dtype="float32") for index in indexes])

    halves = [split(1, 0, 2), split(1, 1, 2)]
    check(*halves)
    check(*halves, (slice(7, 7), slice(0, 6), slice(0, 10)))
    with pytest.raises(CheckpointError, match=r"x \[7, 6, 10\] hold 210 of 420 elements"):
        check(halves[0])
    with pytest.raises(CheckpointError, match="2 pieces twice"):
        check(*halves, *halves)
    with pytest.raises(CheckpointError, match="hold 420 of 420 elements, 1 pieces twice"):
        check(halves[0], halves[0])
    with pytest.raises(CheckpointError, match="lies outside"):
        check(halves[0], (slice(0, 7), slice(4, 7), slice(0, 10)))


def test_one_shape_and_dtype():
    index = everything(WHOLE)
    with pytest.raises(CheckpointError, match=r"float32 \[7, 6, 10\] and float64 \[7, 6, 10\]"):
        check_tiling("x", [make_part(index, dtype="float32"), make_part(index, dtype="float64")])
    with pytest.raises(CheckpointError, match=r"disagree .*\[7, 6, 10\] and .*\[8, 6, 10\]"):
        check_tiling("x", [make_part(index), make_part(index, shape=(8, 6, 10))])


def test_empty_array(comm, tmp_path):
    whole = np.zeros((0, 4), np.int32)
    write_pieces(comm, tmp_path / "a", [make_piece(everything(whole), whole, "x")], {})
    arrays, _ = read_pieces(comm, tmp_path / "a", [make_part(everything(whole), "x", whole.shape)])
    assert arrays["x", (0, 0)].shape == (0, 4) and arrays["x", (0, 0)].dtype == np.int32


@pytest.mark.parametrize("num_bytes", [512, 2000, 9000, 30_000, 66_000, 100_000, 200_000])
@pytest.mark.filterwarnings("error")  # HDF5 has no more to say, as a dataset is released
def test_full_disk_wherever_it_strikes(comm, tmp_path, file_size_limit, num_bytes):
    rows = [np.full(count, count, np.float32) for count in (3, 500, 7000, 16000, 30_000)]
    pieces = [make_piece(everything(array), array, f"x{index}") for index, array in enumerate(rows)]
    with file_size_limit(num_bytes):
        message = error_of(lambda: write_pieces(comm, tmp_path / "a", pieces, {}))
    path = tmp_path / "a.partial" / "rank0000.h5"
    assert message == f"[rank 0 of {comm.size}] {path}: cannot be written: File too large"
    assert not any(tmp_path.iterdir())


def test_full_disk_as_the_master_is_written(comm, tmp_path, file_size_limit):
    with file_size_limit(100_000):
        message = error_of(lambda: write_pieces(comm, tmp_path / "a", [], {"table": np.ones(1 << 16)}))
    path = tmp_path / "a.partial" / "master.h5"
    assert message == f"[rank 0 of {comm.size}] {path}: cannot be written: File too large"
    assert not any(tmp_path.iterdir())


def test_disk_really_full(comm, small_disk):
    write_whole(comm, small_disk / "a", course=1)
    large = np.ones(1 << 18, np.float64)
    message = error_of(lambda: write_pieces(comm, small_disk / "a", [make_piece(everything(large), large)], {}))
    assert message.endswith("a.partial/rank0000.h5: cannot be written: No space left on device")
    assert read_pieces(comm, small_disk / "a", [])[1] == {"course": 1}
    assert [path.name for path in small_disk.iterdir()] == ["a"]


@pytest.mark.mpi
@pytest.mark.parametrize("axis_written", [0, 1, 2])
@pytest.mark.parametrize("axis_read", [0, 1, 2])
def test_any_split_reads_any_other(comm, shared, axis_written, axis_read):
    write_pieces(comm, shared / "a", [make_piece(split(axis_written, comm.rank, comm.size))], {"step": 7})

    # Read as 1 to 5 ranks would, this rank being each of them.
    indexes = [split(axis_read, rank, size) for size in (1, 2, 3, 4, 5) for rank in range(size)]
    for index in indexes:
        arrays, metadata = read_pieces(comm, shared / "a", [make_part(index)])
        np.testing.assert_array_equal(arrays.popitem()[1], WHOLE[index])
        assert metadata == {"step": 7}


@pytest.mark.mpi
def test_experts_dealt_out_in_any_order(comm, shared):
    experts = [expert for expert in reversed(range(SHAPE[0])) if expert % comm.size == comm.rank]
    index_of = {expert: (slice(expert, expert + 1), slice(0, 6), slice(0, 10)) for expert in range(SHAPE[0])}
    write_pieces(comm, shared / "a", [make_piece(index_of[expert]) for expert in experts], {})
    wanted = [make_part(index_of[expert]) for expert in range(SHAPE[0]) if expert % 3 == comm.rank % 3]
    arrays, _ = read_pieces(comm, shared / "a", wanted)
    assert len(arrays) == len(wanted)
    for part in wanted:
        np.testing.assert_array_equal(arrays[part.name, part.start], WHOLE[part.box])


@pytest.mark.mpi
def test_rank_without_pieces_writes_no_file(comm, shared):
    last = comm.size - 1
    write_pieces(comm, shared / "a", [make_piece(everything(WHOLE))] if comm.rank == last else [], {})
    assert sorted(path.name for path in (shared / "a").iterdir()) == ["SHA256SUMS", "master.h5", f"rank{last:04d}.h5"]
    arrays, _ = read_pieces(comm, shared / "a", [make_part(split(2, comm.rank, comm.size))] if comm.rank == 0 else [])
    if comm.rank == 0:
        np.testing.assert_array_equal(arrays.popitem()[1], WHOLE[split(2, 0, comm.size)])
    else:
        assert arrays == {}


@pytest.mark.mpi
def test_all_ranks_learn_which_rank_failed(comm, shared, file_size_limit):
    write_whole(comm, shared / "a", course=1)
    large = np.ones((comm.size, 1 << 18), np.float32)
    failing = comm.size - 1
    piece = make_piece((slice(comm.rank, comm.rank + 1), slice(0, 1 << 18)), large, "x")
    with file_size_limit(1 << 18 if comm.rank == failing else -1):
        message = error_of(lambda: write_pieces(comm, shared / "a", [piece], {}))
    path = shared / "a.partial" / f"rank{failing:04d}.h5"
    assert message == f"[rank {failing} of {comm.size}] {path}: cannot be written: File too large"
    assert [path.name for path in shared.iterdir()] == ["a"]
    assert read_pieces(comm, shared / "a", [])[1] == {"course": 1}


@pytest.mark.mpi
def test_all_ranks_learn_that_a_piece_is_missing(comm, shared):
    pieces = [make_piece(split(0, comm.rank, comm.size + 1))]
    message = error_of(lambda: write_pieces(comm, shared / "a", pieces, {}))
    held = 60 * span(SHAPE[0], comm.size - 1, comm.size + 1)[1]
    rank = f"[rank 0 of {comm.size}]"
    assert message == f"{rank} pieces of experts/layer0/w1 [7, 6, 10] hold {held} of 420 elements, 0 pieces twice"
    assert not any(shared.iterdir())
    on_all(comm, lambda: None)


@pytest.mark.mpi
def test_all_ranks_learn_that_one_wants_another_shape(comm, shared):
    write_whole(comm, shared / "a")
    last = comm.size - 1
    part = make_part(split(0, comm.rank, comm.size), shape=(9, 6, 10) if comm.rank == last else SHAPE)
    message = error_of(lambda: read_pieces(comm, shared / "a", [part]))
    assert message.startswith(f"[rank {last} of {comm.size}] ") and message.endswith("this model wants [9, 6, 10]")
