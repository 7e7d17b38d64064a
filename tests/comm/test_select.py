"""The backend between GPUs is what the config asks for, or the best that all ranks have; or it is rejected."""

import dataclasses

import pytest
from mpi4py import MPI

from hpcmoe.comm.device import PlainDevice
from hpcmoe.comm.select import TransportSupport, format_version, open_all_to_all, read_transport_support, select_backend
from hpcmoe.config import CommConfig
from hpcmoe.errors import ClusterError

NO, YES = "MPI says no", "MPI says yes"
FULL = TransportSupport(gpu="a", nccl=23203, no_nccl="", shares=False, takes_pointers=True, ucx_takes=False, answer=YES)
OTHER = dataclasses.replace(FULL, gpu="b")


def having(*gpus, **changes):
    """What ranks see that have these GPUs."""
    return [dataclasses.replace(FULL, gpu=gpu, **changes) for gpu in gpus]


POOR = {"takes_pointers": False, "answer": NO}
BY_UCX = POOR | {"ucx_takes": True}
CHOICES = {
    "all there is": ({}, having("a", "b"), "nccl", "NCCL 2.32.3"),
    "no NCCL": ({}, having("a", "b", nccl=None, no_nccl="libnccl"), "direct", "no NCCL: rank 0: libnccl; MPI says yes"),
    "neither": ({}, having("a", "b", nccl=None, no_nccl="x", **POOR), "staged", "no NCCL: rank 0: x; rank 0: MPI says"),
    "one without": ({}, [*having("a"), dataclasses.replace(OTHER, nccl=None, no_nccl="x")], "direct", "rank 1: x"),
    "two versions": ({}, [*having("a"), dataclasses.replace(OTHER, nccl=23004)], "direct", "2.30.4, 2.32.3"),
    "one GPU": ({}, having("a", "b", "a"), "direct", "ranks 0, 2 share a GPU"),
    "one GPU, told": ({}, having("a", "a", shares=True), "nccl", "each rank"),
    "one GPU, told, old": ({}, having("a", "a", shares=True, nccl=22907), "direct", "from 2.30 on"),
    "no GPU": ({}, having(None, None), "direct", "rank 0 has no GPU"),
    "by MPI": ({"transport": "mpi"}, having("a", "b"), "direct", YES),
    "mpi, staged": ({"transport": "mpi", "buffers": "staged"}, having("a", "b"), "staged", "[comm] buffers"),
    "mpi, by UCX, asked for": ({"transport": "mpi", "buffers": "direct"}, having("a", "b", **BY_UCX), "direct", NO),
    "mpi, by UCX, not asked": ({"transport": "mpi"}, having("a", "b", **BY_UCX), "staged", NO),
    "mpi, none": ({"transport": "mpi"}, having("a", "b", **POOR), "staged", NO),
    "staged, if by MPI": ({"buffers": "staged"}, having("a", "a"), "staged", "share a GPU"),
    "nccl": ({"transport": "nccl", "buffers": "direct"}, having("a", "b", **POOR), "nccl", "NCCL"),
}
REJECTED = {
    "nccl, no GPU": ({"transport": "nccl"}, having(None), r'transport = "nccl": rank 0 has no GPU; use "mpi"'),
    "nccl, one GPU": ({"transport": "nccl"}, having("a", "a"), r"NCCL_MULTI_RANK_GPU_ENABLE=1"),
    "direct, not so": ({"transport": "mpi", "buffers": "direct"}, having("a", **POOR), r"rank 0: MPI says no; use"),
    "direct, auto": ({"buffers": "direct"}, having("a", "a", **POOR), r'buffers = "direct": rank 0: MPI says no'),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_the_choice_and_its_reason(case):
    keys, support_of_rank, kind, reason = CHOICES[case]
    selected = select_backend(CommConfig(**keys), support_of_rank, "overlap")
    assert selected.kind == kind and reason in selected.reason and "\n" not in selected.reason


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_not_there_is_refused_in_one_line(case):
    keys, support_of_rank, text = REJECTED[case]
    with pytest.raises(ClusterError, match=text) as rejected:
        select_backend(CommConfig(**keys), support_of_rank, "overlap")
    assert "\n" not in str(rejected.value) and str(rejected.value).startswith("[comm] ")


def test_nccl_wants_the_same_order_on_all_ranks():
    assert select_backend(CommConfig(), having("a", "b"), "arrival").kind == "direct"
    with pytest.raises(ClusterError, match="arrival"):
        select_backend(CommConfig(transport="nccl"), having("a", "b"), "arrival")


def test_a_rank_without_a_gpu_sees_no_nccl():
    support = read_transport_support(MPI.COMM_SELF, PlainDevice())
    assert (support.gpu, support.nccl) == (None, None) and support.no_nccl


def test_versions_are_written_as_people_do():
    assert [format_version(number) for number in (23203, 22907, 23000)] == ["2.32.3", "2.29.7", "2.30.0"]


def test_an_unknown_backend_is_rejected():
    with pytest.raises(ValueError, match="pigeon"), open_all_to_all("pigeon", None, None, 16, None):
        pass
