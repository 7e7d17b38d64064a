"""Small jobs for tests: a config, a topology by hand, and the logical arrays that the ranks hold together."""

import contextlib
import dataclasses
import functools
import json

import numpy as np
import torch

from hpcmoe.clock import Clock
from hpcmoe.cluster.discover import Topology
from hpcmoe.cluster.mesh import open_mesh
from hpcmoe.comm.device import HostDevice, PlainDevice
from hpcmoe.comm.mpi import open_mpi_transport
from hpcmoe.comm.select import open_all_to_all
from hpcmoe.comm.transport import Loopback
from hpcmoe.comm.window import make_private_window, open_window
from hpcmoe.config import Config
from hpcmoe.dispatch.device import DeviceDispatcher
from hpcmoe.dispatch.host import HostDispatcher
from hpcmoe.dispatch.routes import make_routes
from hpcmoe.dispatch.sizes import DeviceSizes, HostSizes, make_host_sizes, max_messages_sent
from hpcmoe.model.text import find_text
from hpcmoe.placement.files.loads import find_loads
from hpcmoe.prepare.sizes import make_sizes as make_run_sizes
from hpcmoe.run.job import open_job
from hpcmoe.run.optimizer import Optimizer
from hpcmoe.run.state import TrainingState
from hpcmoe.wait import barrier, gather_to_all
from hpcmoe.write.problem import read_loads

SMALL = {
    "model.hidden": 8, "model.feed_forward": 12, "model.num_layers": 2, "model.num_heads": 2, "model.num_experts": 4,
    "model.sequence_length": 5, "data.batch_sequences": 14, "pipeline.micro_batches": 3, "comm.buffer_factor": 1.0,
    "data.validation_sequences": 9, "run.threads_per_rank": 1, "placement.seconds_per_token": 1e-6,
    "placement.search_iterations": 50,
}  # fmt: skip
BY_BACKEND = {
    "direct": {"comm__transport": "mpi", "comm__buffers": "direct"},
    "staged": {"comm__transport": "mpi", "comm__buffers": "staged"},
    "nccl": {"comm__transport": "nccl"},
}  # what carries rows between devices: the keys that ask for it
RANDOM_TEXT = np.random.default_rng(7).integers(0, 256, 4000, dtype=np.uint8).tobytes()


def make_config(**changes):
    """Make a small Config with some keys changed, as section__key=value."""
    config = Config()
    for name, value in (SMALL | {key.replace("__", "."): value for key, value in changes.items()}).items():
        section, key = name.split(".")
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def make_sizes_of(config, mesh, topology, routes):
    """The sizes that a config gives a rank on the host."""
    common = make_run_sizes(config.spec, config.pipeline, config.data.batch_sequences, config.placement.replicate, mesh)
    return make_host_sizes(common, config.comm, topology, routes, config.spec.trains, config.pipeline.deterministic)


def make_topology(num_ranks, num_nodes=1):
    """Make a topology of ranks dealt to nodes in blocks."""
    node_of_rank = np.arange(num_ranks) * num_nodes // num_ranks
    return Topology(
        node_of_rank=node_of_rank,
        node_names=tuple(f"n{node}" for node in range(num_nodes)),
        rack_of_node=np.zeros(num_nodes, np.int64),
        rack_names=("rack0",),
        bytes_per_second=np.full((num_nodes, num_nodes), 1e9),
        latency_seconds=np.full((num_nodes, num_nodes), 1e-6),
        egress_bytes_per_second=np.full(num_nodes, 1e9),
        ingress_bytes_per_second=np.full(num_nodes, 1e9),
        uplink_bytes_per_second=np.full(1, np.inf),
        memory_bytes=np.full(num_nodes, 10**12),
        devices_of_node=np.zeros(num_nodes, np.int64),
        cores_of_node=np.full(num_nodes, 2),
        source={"links": "by hand"},
    )


@contextlib.contextmanager
def open_small_job(comm, folder, num_nodes=1, text=RANDOM_TEXT, loads=None, **changes):
    """Open a job on a file of its own in `folder`, which all ranks see -> (Job, Optimizer if it trains, TrainingState).

    loads: rows of probabilities, which go by a file too.
    """
    file = folder / "text.bin"
    if comm.rank == 0:
        file.write_bytes(text)
        (folder / "loads.json").write_text(json.dumps(loads))
    barrier(comm)  # politely: rank 0 may still be with the oracle of the test before
    changes |= {} if loads is None else {"placement__loads": str(folder / "loads.json")}
    config = make_config(data__files=(str(file),), data__exclude=(), **changes)
    split = find_text(config.data, config.model.sequence_length)
    with (
        open_mesh(comm, config.parallel) as mesh,
        open_job(
            config,
            make_topology(comm.size, min(num_nodes, comm.size)),
            mesh,
            split,
            find_loads(config.placement.loads, config.model, read_loads),
        ) as job,
    ):
        trains = config.run.mode == "train"
        optimizer = Optimizer(job.stepper.network, job.placement, config, mesh) if trains else None
        yield job, optimizer, TrainingState(job, optimizer)


def gather_logical(comm, state, array_of):
    """Assemble every logical array from all ranks' parts, array_of(parameter) -> dict name: array.

    Where ranks hold copies of a part they must agree bit for bit.
    """
    parts = [
        (part.name, part.shape, part.start, part.extent, array_of(parameter).numpy(force=True).copy())
        for parameter, part in state.slices.items()
    ]
    whole, seen = {}, {}
    for part in gather_to_all(comm, parts):
        for name, shape, start, extent, array in part:
            box = tuple(slice(first, first + count) for first, count in zip(start, extent, strict=True))
            target = whole.setdefault(name, np.full(shape, np.nan, np.float32))
            if (name, start) in seen:
                assert np.array_equal(seen[name, start], array), f"copies of {name} {start} differ"
            seen[name, start] = array
            target[box] = array.reshape(extent)
    assert not any(np.isnan(array).any() for array in whole.values()), "a part of an array is on no rank"
    return {name: torch.from_numpy(array) for name, array in whole.items()}


def make_dispatcher(hidden, transport=None, window=None, node_of_rank=(0,), once=False, slots=1, **sizes):
    """An exchange on the host, alone in its window unless one is given; 20 tokens a micro-batch unless sizes say so."""
    transport = transport or Loopback()
    nodes = max(node_of_rank) + 1
    routes = make_routes(node_of_rank, transport.rank, slots, np.full((nodes, nodes), once))
    sizes = make_sizes(routes, hidden=hidden, **sizes)
    window = window or make_private_window(sizes.window_sizes(routes))
    return HostDispatcher(transport, window, HostDevice(), Clock(), sizes, routes)


@contextlib.contextmanager
def open_small_dispatcher(comm, hidden, num_nodes=1, once=False, hesitate=None, **changes):
    """Open a dispatcher over MPI, its ranks dealt to nodes in blocks; sizes, and slots, as make_dispatcher's."""
    node_of_rank = np.arange(comm.size) * num_nodes // comm.size
    local_comm = comm.Split(int(node_of_rank[comm.rank]), comm.rank)
    routes = make_routes(node_of_rank, comm.rank, changes.get("slots", 1), np.full((num_nodes, num_nodes), once))
    sizes = make_sizes(routes, hidden=hidden, **{key: value for key, value in changes.items() if key != "slots"})
    with (
        open_window(local_comm, sizes.window_sizes(routes)) as window,
        open_mpi_transport(comm, sizes.row_bytes) as transport,
    ):
        hesitate_to_poke(transport, hesitate)
        yield make_dispatcher(hidden, transport, window, node_of_rank, once, **changes)
    local_comm.Free()


@contextlib.contextmanager
def open_small_device_dispatcher(comm, kind="direct", row_ops=None, **changes):
    """Open an exchange on the host in a GPU's place -> DeviceDispatcher. Collective over comm."""
    usual = {
        "hidden": 4, "dtype": torch.float32, "tokens": 20, "top_k": 3, "num_in_flight": 2,
        "num_micro_batches": 2, "expert_rows": 60, "buffer_factor": 1.0, "batch_rows": 2**62,
    } | changes  # fmt: skip
    sizes, one = DeviceSizes(**usual), np.zeros((1, 1), bool)
    routes, device = make_routes(np.zeros(comm.size, int), comm.rank, 2, one), PlainDevice()
    device.row_ops = row_ops or device.row_ops
    with (
        open_mpi_transport(comm, sizes.row_bytes) as transport,
        open_all_to_all(kind, comm, device, sizes.row_bytes, transport) as all_to_all,
    ):
        yield DeviceDispatcher(all_to_all, transport, device, Clock(), sizes, routes)


def hesitate_to_poke(transport, hesitate):
    """Let nothing progress in a transport while hesitate(), if any, is true."""
    poke = transport.poke
    if hesitate is not None:
        transport.poke = lambda: not hesitate() and poke()


def record_sends(transport):
    """List the tags of the messages that a transport sends from now on, as it sends them."""
    tags = []
    for name in ("send_rows", "send_words"):

        def send(carry, array, peer, tag):
            tags.append(tag)
            return carry(array, peer, tag)

        setattr(transport, name, functools.partial(send, getattr(transport, name)))
    return tags


def make_sizes(routes, **sizes):
    """Sizes of a small exchange, its pool as large as all messages of an even load."""
    usual = {
        "dtype": torch.float32, "tokens": 20, "top_k": 2, "num_in_flight": 1, "num_micro_batches": 2, "expert_rows": 40,
        "batch_rows": 100, "message_tokens": 8, "pool_rows": 200 * bool(routes.senders),
        "messages_at_once": 4, "in_order": True, "deterministic": True,
    } | sizes  # fmt: skip
    sent = max_messages_sent(len(routes.receivers), *(usual[name] for name in ("tokens", "top_k", "message_tokens")))
    return HostSizes(num_messages_sent=sent, **usual)


def gather_pieces(comm, state, shared):
    """Join what all ranks would save -> dict name: array; every number must be saved exactly once. Collective."""
    arrays, times = {}, {}
    for pieces in gather_to_all(comm, list(state.collect(shared))):
        for part, piece in pieces:
            box = tuple(slice(first, first + count) for first, count in zip(part.start, piece.shape, strict=True))
            arrays.setdefault(part.name, np.empty(part.shape, piece.dtype))[box] = piece
            times.setdefault(part.name, np.zeros(part.shape, int))[box] += 1
    assert all((count == 1).all() for count in times.values()), "a number is saved by no rank, or by two"
    return arrays


class Notes:
    """Records that a test can read: what was appended, by chapter/name and step."""

    def __init__(self):
        self.values, self.units = {}, {}

    def append(self, step, chapter, name, value, unit=""):
        series = self.values.setdefault(f"{chapter}/{name}", {})
        assert step not in series, f"{chapter}/{name} of step {step} comes twice"
        series[step] = value
        self.units[f"{chapter}/{name}"] = unit

    sample = append

    def flush_if_due(self):
        """Nothing is buffered."""
