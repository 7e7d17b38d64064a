"""The GPU's bench, on the host in its place: its figures follow from times, and spans are weighed as they lie."""

import pytest
from bench import gpu, gpu_layer
from bench.gpu_profile import draw, merge, weigh
from kernels import compiler_for_host

from hpcmoe.comm.device import PlainDevice
from hpcmoe.comm.rows import KernelRowOps


def test_where_there_is_no_gpu_it_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "find_missing_cuda", lambda: "no CUDA device")
    with pytest.raises(pytest.skip.Exception, match="no CUDA device"):
        gpu.measure(tmp_path)


def test_its_figures_are_rates_and_their_ratios(tmp_path):
    experts = gpu.time_experts(PlainDevice(), 2, 16, 32, 21)
    assert experts["rows"] == 20 and set(experts["flops"]) == {"ours", "dense", "grouped", "turns"}
    assert all(rate > 0 for rate in experts["flops"].values())
    device = PlainDevice()
    device.row_ops = KernelRowOps(compiler_for_host(tmp_path))
    kernels = gpu.time_kernels(device, 16, 50)
    moves = ["pack", "take", "lay", "sum"]
    assert [(k["kernel"], k["by"]) for k in kernels] == [
        (move, by) for by in (device.row_ops.name, "torch") for move in moves
    ]
    assert all(kernel["bytes_per_second"] > 0 and kernel["ratio"] > 0 for kernel in kernels)
    shape = gpu_layer.MIDDLE.but(tokens=32, hidden=16, feed_forward=32, training=True)
    layers = {"small": gpu_layer.measure_shape(shape, budget_seconds=0.1)}
    profile = {"transfers": 0.002, "hidden": 0.75, "working": 0.003, "span": 0.004}
    of_ranks = {
        "ranks": 2,
        "gpus": 1,
        "ways": {"nccl": "ranks share a GPU", "staged": 2e9},
        "profiles": {"staged": profile},
    }
    table = gpu.make_table({"experts": [experts], "kernels": kernels, "layers": layers, "ranks": [of_ranks]})
    assert gpu.compare({"ours": 3.0, "dense": 4.0, "turns": 2.0}) == "0.75 of dense, 1.50 of turns"
    assert "of dense" in table and "ranks share a GPU" in table and "0.75 of them beside kernels" in table


def test_spans_that_overlap_count_once(tmp_path):
    assert merge([(3, 4), (0, 1), (0.5, 2)]) == [(0, 2), (3, 4)]
    kernels = [(13, 0.0, 2.0), (17, 1.0, 4.0), (7, 3.0, 5.0), (7, 0.0, 1.0), (7, 4.5, 6.0)]
    assert weigh(kernels) == {"transfers": 4.0, "hidden": 0.5, "working": 4.0, "span": 6.0}
    assert weigh([(7, 0.0, 1.0)])["hidden"] == 0.0
    draw(kernels, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 1000
