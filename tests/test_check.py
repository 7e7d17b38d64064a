"""`python -m hpcmoe.check` tells what there is and what is missing, tries each way, and ends 0."""

import errno
import itertools
import json
import os
import re
import sys

import pytest
from launch import mpirun, run
from small import make_topology

from hpcmoe import rank_speed
from hpcmoe.rank_speed import RankSpeed, describe_all, describe_speeds, find_lock_error


def values_of(output):
    """The lines of the two columns -> list of (what, text)."""
    return [(line[:12].strip(), line[13:]) for line in output.splitlines()]


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (1, 3))])
def test_it_tells_what_is_here_and_tries_it(ranks):
    ended = mpirun(ranks, "-m", "hpcmoe.check") if ranks > 1 else run(sys.executable, "-m", "hpcmoe.check")
    assert ended.status == 0, ended
    lines = values_of(ended.output)
    told = dict(lines)
    assert told["ranks"].startswith(f"{ranks} rank") and "Slurm" in told["launcher"]
    software = {"Python", "MPI", "torch", "CuPy", "NCCL"}
    assert software | {
        "links",
        "racks",
        "GEMM",
        "memory",
        "file locks",
        "rows",
        "try nccl",
        "try direct",
        "try staged",
    } <= set(told)
    assert any("to CUDA pointers" in text for _, text in lines)
    assert re.search(r"works: 1 MB from each rank to each, \S+ GB/s", told["try staged"]), ended
    if "in a GPU's place" in told["try staged"]:
        assert told["CuPy"].startswith("none: pip install") or told["CuPy"].startswith("cupy")
        assert told["rows"] == "moved by torch"
        assert told["try nccl"] == "not tried: rank 0 has no GPU"
        assert any(text.startswith("not used: ") for _, text in lines)


def test_a_script_reads_one_json_object(tmp_path):
    ended = mpirun(2, "-m", "hpcmoe.check", "--json", "--output", str(tmp_path / "not" / "yet"))
    assert ended.status == 0, ended
    found = json.loads(ended.output)
    assert found["num_ranks"] == 2 and [entry["rank"] for entry in found["ranks"]] == [0, 1]
    assert all(entry["gemm_flops_per_second"] > 0 and entry["file_lock_error"] is None for entry in found["ranks"])
    (node,) = found["nodes"]
    assert node["ranks"] == [0, 1] and node["egress_bytes_per_second"] > 0 and node["memory_bytes"] > 1e6
    assert found["links"] == [] and found["slow_nodes"] == [] and found["racks"][0]["uplink_bytes_per_second"] is None
    assert set(found["backends"]) == {"nccl", "direct", "staged"} and found["software"]["torch"]
    assert list(tmp_path.iterdir()) == []


def make_speed(gigaflops, lock_error=None):
    """What a rank of such speed reports."""
    return RankSpeed(
        flops_per_second=gigaflops * 1e9, memory_bytes=10**10, shared_memory_bytes=None, lock_error=lock_error, cores=4
    )


def test_a_slow_node_is_named_and_every_pair_and_port_told():
    topology = make_topology(6, 3)
    speeds = [make_speed(rate) for rate in (10, 11, 10, 9, 4, 5)]
    found = describe_all(topology, speeds)
    names = topology.node_names
    assert found["slow_nodes"] == [names[2]] and [node["is_slow"] for node in found["nodes"]] == [False, False, True]
    assert found["ranks"][4]["gemm_to_median"] == pytest.approx(4 / 9.5)
    assert [(link["from"], link["to"]) for link in found["links"]] == [*itertools.permutations(names, 2)]
    assert all(link["bytes_per_second"] > 0 for link in found["links"])
    told = describe_speeds([*speeds[:5], make_speed(5, "/x: no locks available")], topology)
    assert ("", f"SLOW: {names[2]} computes far slower than the median node") in told
    assert ("file locks", "/x: no locks available") in told and ("", "no /dev/shm") in told
    json.dumps(found, allow_nan=False)


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    assert find_lock_error(tmp_path / "a" / "b") is None

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(rank_speed.fcntl, "flock", refuse)
    assert find_lock_error(tmp_path / "a") == f"{tmp_path}: No locks available"


def test_an_argument_is_refused_and_help_is_shown():
    ended = run(sys.executable, "-m", "hpcmoe.check", "--fast")
    assert ended.status == 2 and ended.lines("hpcmoe: command line: unrecognized arguments: --fast"), ended
    ended = run(sys.executable, "-m", "hpcmoe.check", "--help")
    assert ended.status == 0 and "mpirun" in ended.output, ended
