"""The GPU's bench, on the host in its place: its figures follow from times, and spans are weighed as they lie."""

import pytest
from bench import gpu
from bench.gpu_profile import merge, weigh

from hpcmoe.comm.plain import PlainDevice


def test_where_there_is_no_gpu_it_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "find_missing", lambda: "no CUDA device")
    with pytest.raises(pytest.skip.Exception, match="no CUDA device"):
        gpu.measure(tmp_path)


def test_its_figures_are_rates_and_their_ratios():
    experts = gpu.time_experts(PlainDevice(), 2, 16, 32, 21)
    assert experts["rows"] == 20 and set(experts["flops"]) == {"ours", "dense", "grouped", "turns"}
    assert all(rate > 0 for rate in experts["flops"].values())
    kernels = gpu.time_kernels(PlainDevice(), 16, 50)
    assert [kernel["kernel"] for kernel in kernels] == ["pack", "take", "lay", "sum"]
    assert {kernel["by"] for kernel in kernels} == {"torch"}  # on a GPU ours too
    assert all(kernel["bytes_per_second"] > 0 and kernel["ratio"] > 0 for kernel in kernels)
    profile = {"transfers": 0.002, "hidden": 0.75, "kernels": 9}
    of_ranks = {
        "ranks": 2,
        "gpus": 1,
        "ways": {"nccl": "ranks share a GPU", "staged": 2e9},
        "profiles": {"staged": profile},
    }
    table = gpu.make_table({"experts": [experts], "kernels": kernels, "ranks": [of_ranks]})
    assert gpu.compare({"ours": 3.0, "dense": 4.0, "turns": 2.0}) == "0.75 of dense, 1.50 of turns"
    assert "of dense" in table and "ranks share a GPU" in table and "0.75 beside kernels" in table


def test_spans_that_overlap_count_once():
    assert merge([(3, 4), (0, 1), (0.5, 2)]) == [(0, 2), (3, 4)]
    kernels = [("Memcpy DtoH", 0.0, 2.0), ("nccl send", 1.0, 4.0), ("gemm", 3.0, 5.0), ("gemm", 0.0, 1.0)]
    assert weigh(kernels) == {"transfers": 4.0, "hidden": 0.5, "kernels": 4}
    assert weigh([*kernels, ("Memcpy DtoD", 0.0, 9.0)]) == weigh(kernels)
    assert weigh([("gemm", 0.0, 1.0)])["hidden"] == 0.0
