"""On a GPU: the experts' block against torch's own products, rows moved against a copy, ways against each other.

A layer on one rank is set against its GEMMs. Last a step of several micro-batches goes under torch's profiler: how much
of the transfers ran beside kernels. Ranks share the GPU where there is one alone.
"""

import contextlib
import math
import statistics
import time

import numpy as np
import pytest
import torch
from bench import gpu_layer, ranks
from bench.gpu_profile import profile_step
from bench.pairs import show_milliseconds, show_ratio
from mpi4py import MPI
from tabulate import tabulate
from torch.nn.functional import gelu

from hpcmoe.clock import Clock
from hpcmoe.comm.all_to_all import DirectAllToAll
from hpcmoe.comm.cuda import count_gpus, describe_gpu, find_missing_cuda, has_grouped_gemm
from hpcmoe.comm.device import open_device
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.comm.rows import TorchRowOps
from hpcmoe.comm.select import find_obstacles, read_transport_support
from hpcmoe.comm.self_test import run_self_test
from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.device import DeviceDispatcher
from hpcmoe.dispatch.device_plan import DeviceBatch
from hpcmoe.dispatch.dispatcher import ExchangeId
from hpcmoe.dispatch.routes import make_routes
from hpcmoe.dispatch.sizes import DeviceSizes
from hpcmoe.experts.feed_forward import Expert, GroupedExperts
from hpcmoe.experts.products import Groups, find_grouped_gemm
from hpcmoe.wait import gather_to_all

HIDDEN, FEED_FORWARD, TOKENS, TOP_K = 8192, 32768, 10000, 2  # the published sizes, of a rank
EXPERTS = (1, 4)
ROUNDS = 5
EXPERT_TIMES, MOVE_TIMES = 5, 50  # calls of a round, of 30 ms and of 0.2 ms
RANKS = (2, 4)


def measure(folder):
    """Measure on the first GPU, then between ranks -> figures. Skipped where there is none."""
    if find_missing_cuda():
        pytest.skip(find_missing_cuda())
    device = open_device("cuda", 0)
    figures = {
        "gpu": describe_gpu(0),
        "experts": [time_experts(device, number, HIDDEN, FEED_FORWARD, TOKENS * TOP_K) for number in EXPERTS],
        "kernels": time_kernels(device, HIDDEN, TOKENS),
        "layers": {str(shape): gpu_layer.measure_shape(shape) for shape in gpu_layer.SHAPES},
    }
    torch.cuda.empty_cache()  # the ranks need the memory
    device.pool.free_all_blocks()
    return figures | {"ranks": [ranks.run_ranks(number, "gpu", folder, folder.absolute()) for number in RANKS]}


def time_calls(device, calls, times):
    """Time calls by name that take turns, each so many at once -> median seconds of one."""
    seconds = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            device.synchronize()
            begun = time.perf_counter()
            for _ in range(times):
                call()
            device.synchronize()
            if turn > 0:  # the first warms up
                seconds[name].append((time.perf_counter() - begun) / times)
    return {name: statistics.median(of_name) for name, of_name in seconds.items()}


def time_experts(device, num_experts, hidden, feed_forward, rows):
    """Time the forward block of a few experts against torch's products: dense, grouped, in turns -> figures.

    The dense product has no activation, the others have; ours is a grouped one itself where products are short.
    """
    draw = {"dtype": torch.bfloat16, "device": device.torch_device}
    weights = [
        {"up": torch.randn(feed_forward, hidden, **draw) / math.sqrt(hidden),
         "down": torch.randn(hidden, feed_forward, **draw) / math.sqrt(feed_forward)}
        for _ in range(num_experts)
    ]  # fmt: skip
    experts = GroupedExperts([Expert("gelu", own) for own in weights])
    experts.stack_weights()
    slots = [(slot, rows // num_experts) for slot in range(num_experts)]
    x = torch.randn(num_experts * (rows // num_experts), hidden, **draw)
    groups = Groups([rows // num_experts] * num_experts, device.torch_device)
    calls = {"ours": lambda: experts(slots, x, None)} | theirs(experts.stacked, groups, x)
    flops = 4 * len(x) * hidden * feed_forward
    rates = {name: flops / seconds for name, seconds in time_calls(device, calls, EXPERT_TIMES).items()}
    return {"experts": num_experts, "rows": len(x), "flops": rates}


def theirs(stacked, groups, x):
    """What torch offers for a block on rows x -> calls by name: one matrix for all, grouped products, one by one."""
    up, down = (stacked[name].array.transpose(1, 2) for name in ("up", "down"))  # [e, in, out]
    product, parts = find_grouped_gemm(), list(zip(x.split(groups.rows), up, down, strict=True))
    calls = {"dense": lambda: (x @ up[0]) @ down[0]}
    if product is not None and has_grouped_gemm(x.device):
        calls["grouped"] = lambda: product(gelu(product(x, up, offs=groups.ends)), down, offs=groups.ends)
    return calls | {"turns": lambda: [gelu(own @ a) @ b for own, a, b in parts]}


def time_kernels(device, hidden, tokens):
    """Time what dispatch and combine do with rows, by the device's row_ops and by torch, against a copy -> figures."""
    sizes = DeviceSizes(
        hidden=hidden, dtype=torch.bfloat16, tokens=tokens, top_k=TOP_K, num_in_flight=1, num_micro_batches=1,
        expert_rows=tokens * TOP_K, buffer_factor=1.0, batch_rows=2**62,
    )  # fmt: skip
    comm, random = MPI.COMM_SELF, np.random.default_rng(0)
    routes = make_routes((0,), 0, 16, np.zeros((1, 1), bool))
    with open_mpi_transport(comm, sizes.row_bytes, bind_thread=device.bind_thread) as transport:
        dispatcher = DeviceDispatcher(DirectAllToAll(transport, device), transport, device, Clock(), sizes, routes)
        slots = np.argsort(random.random((tokens, 16)), axis=1)[:, :TOP_K]
        source, target = (torch.empty_like(dispatcher.in_flight_buffers[0].home.buffer.tensor) for _ in range(2))
        calls, num_bytes = {"copy": lambda: target.copy_(source)}, {"copy": 2 * source.nbytes}
        for row_ops in (device.row_ops, TorchRowOps()):
            with moving_by(device, row_ops):
                moves = make_moves(dispatcher, slots)
            calls |= {(name, row_ops.name): moved_by(device, row_ops, move) for name, (_, move) in moves.items()}
            num_bytes |= {(name, row_ops.name): moved for name, (moved, _) in moves.items()}
        rates = {name: num_bytes[name] / each for name, each in time_calls(device, calls, MOVE_TIMES).items()}
    copy_rate = rates.pop("copy")
    return [{"kernel": name, "by": by, "bytes_per_second": rate, "ratio": rate / copy_rate}
            for (name, by), rate in rates.items()]  # fmt: skip


@contextlib.contextmanager
def moving_by(device, row_ops):
    """Have a row_ops move the device's rows within the with-block."""
    before, device.row_ops = device.row_ops, row_ops
    yield
    device.row_ops = before


def moved_by(device, row_ops, move):
    """Make a call that moves rows by a row_ops."""

    def call():
        with moving_by(device, row_ops):
            move()

    return call


def make_moves(dispatcher, slots):
    """Make all moves of an exchange's rows -> dict name: (bytes, call); a token is read once for all its copies."""
    plan, exchange = dispatcher.make_plan(slots, None), ExchangeId(0, 0, Direction.DISPATCH)
    while not dispatcher.poll_ready(plan, exchange):
        dispatcher.poke()
    sizes, device, buffers = dispatcher.sizes, dispatcher.device, dispatcher.in_flight_buffers[0]
    x = torch.randn(sizes.tokens, sizes.hidden, device=device.torch_device)
    gates = torch.full((sizes.tokens, sizes.top_k), 0.5, device=device.torch_device)
    handle = dispatcher.dispatch(plan, x, gates, exchange)
    (chunk,) = dispatcher.split(handle, DeviceBatch(plan.coming, device))
    rows, _ = dispatcher.gather(chunk.rows)
    copies = rows.nbytes
    return {
        "pack": (copies + x.nbytes, lambda: dispatcher.pack(plan, x, gates, buffers)),
        "take": (2 * copies, lambda: dispatcher.gather(chunk.rows)),
        "lay": (2 * copies, lambda: dispatcher.scatter(rows, chunk.rows)),
        "sum": (copies + x.nbytes, lambda: dispatcher.combine(handle, gates)),
    }


def work(comm, folder):
    """Measure each way between these ranks, and profile a step by it -> figures. Collective over comm."""
    device = open_device("cuda", comm.rank)
    support_of_rank = gather_to_all(comm, read_transport_support(comm, device))
    missing = find_obstacles(support_of_rank)
    rates = {kind: why or min(gather_to_all(comm, run_self_test(kind, comm, device))) for kind, why in missing.items()}
    profiles = {kind: profile_step(comm, folder, kind) for kind, why in missing.items() if not why}
    return {"ranks": comm.size, "gpus": count_gpus(), "ways": rates, "profiles": profiles}


def make_table(figures):
    """Show the figures -> text."""
    rows = [["experts' block", f"{e['experts']} x {e['rows'] // e['experts']} rows", f"{e['flops']['ours'] / 1e12:.0f}",
             "TFLOP/s", compare(e["flops"])] for e in figures["experts"]]  # fmt: skip
    rows += [[k["kernel"], k["by"], f"{k['bytes_per_second'] / 1e9:.0f}", "GB/s", f"{k['ratio']:.2f} of a copy"]
             for k in figures["kernels"]]  # fmt: skip
    for name, pairs in figures["layers"].items():
        took = show_milliseconds(pairs["median_seconds"]["ours"] / gpu_layer.IN_A_ROW)
        rows.append(["layer", name, took, "ms", f"{show_ratio(pairs)} of its GEMMs, activation up"])
    for of_ranks in figures["ranks"]:
        for kind, rate in of_ranks["ways"].items():
            shown = (f"{rate / 1e9:.3g}", "GB/s a rank") if isinstance(rate, float) else ("-", rate)
            rows.append([kind, f"{of_ranks['ranks']} ranks, {of_ranks['gpus']} GPUs", *shown, ""])
        for kind, profile in of_ranks["profiles"].items():
            took = f"{1e3 * profile['transfers']:.3g} of {1e3 * profile['span']:.3g}"
            share = f"{profile['hidden']:.2f} of them beside kernels, which ran {1e3 * profile['working']:.3g} ms"
            rows.append([f"profile, {kind}", f"{of_ranks['ranks']} ranks", took, "ms of transfers", share])
    return tabulate(rows, ["what", "of", "value", "unit", "beside"], disable_numparse=True)


def compare(rates):
    """Tell our rate as shares of the others' -> text."""
    return ", ".join(f"{rates['ours'] / rate:.2f} of {name}" for name, rate in rates.items() if name != "ours")


if __name__ == "__main__":
    ranks.main(work)
