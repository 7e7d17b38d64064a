"""A GPU of one rank: CuPy's memory under torch's tensors, three streams, and events that order what is done on them.

Torch works on the compute stream; the send and receive streams are for copies and for NCCL. All are torch's own;
CuPy's calls take their addresses. Nothing of CuPy is imported before a GPU is opened.
"""

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from hpcmoe.comm.rows import Buffer, open_row_ops
from hpcmoe.errors import ClusterError

_CUPY = 'cupy is missing: pip install "hpcmoe[gpu]", or cupy-cuda12x where the driver is of CUDA 12'
_FIRST_GROUPED = (9, 0)  # compute capability of the GPUs whose grouped GEMM all versions of torch have


def list_stream_spans(events: Iterable[Any], epoch_seconds: float) -> Iterator[tuple[str, int, float, float]]:
    """Yield what of a profiler's events ran on a device; epoch_seconds: when time.perf_counter() was 0, since 1970."""
    for event in events:
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            begin = event.start_ns() / 1e9 - epoch_seconds
            yield event.name(), event.device_resource_id(), begin, begin + event.duration_ns() / 1e9


def count_gpus() -> int:
    """Count the GPUs that torch may use."""
    return torch.cuda.device_count()


def find_missing_cuda() -> str | None:
    """Return what keeps this rank from a GPU, in a few words; None where nothing does."""
    if count_gpus() == 0:
        built = "torch finds no CUDA device here" if torch.version.cuda else "this torch is built without CUDA"
        return f"{built} (nvidia-smi shows those that the driver has)"
    return None if importlib.util.find_spec("cupy") else _CUPY


StreamSpan = tuple[str, int, float, float]  # what ran, its stream, when it began and ended by time.perf_counter()


class CudaDevice:
    """A Device: one GPU, as one rank sees it."""

    name = "cuda"

    def __init__(self, index: int) -> None:
        cupy = import_cupy()
        torch.cuda.set_device(index)
        self.cupy, self.torch_device = cupy, torch.device("cuda", index)
        self.bind_thread()
        self.pool = cupy.cuda.MemoryPool()  # of message buffers alone: torch's pool never holds them
        self.compute_stream = torch.cuda.default_stream()
        self.send_stream, self.recv_stream = torch.cuda.Stream(), torch.cuda.Stream()
        cupy.cuda.Stream.null.use()  # kernels of our own go to the compute stream, which is this one
        self.row_ops = open_row_ops(functools.partial(compile_kernel, cupy))

    @property
    def generators(self) -> list[torch.Generator]:
        """Return torch's generators of random numbers: the CPU's, and this GPU's."""
        return [torch.default_generator, torch.cuda.default_generators[self.torch_device.index]]

    def bind_thread(self) -> None:
        """Make this GPU the calling thread's own: MPI, where it progresses messages on a GPU, looks for it there."""
        self.cupy.cuda.Device(self.torch_device.index).use()

    def use(self, stream: torch.cuda.Stream) -> torch.cuda.StreamContext:
        """Make torch work on a stream within the with-block."""
        return torch.cuda.stream(stream)

    def make_buffer(self, num_rows: int, row_bytes: int) -> Buffer:
        """Allocate message rows on the GPU, all zero; the host waits for them."""
        self.pool.free_all_blocks()  # neither pool may keep what the other needs
        torch.cuda.empty_cache()
        with self.cupy.cuda.using_allocator(self.pool.malloc):
            array = self.cupy.zeros((num_rows, row_bytes), self.cupy.uint8)
        self.synchronize()  # the first to write need not wait for the zeros
        return Buffer(array=array, tensor=torch.from_dlpack(array))

    def make_pinned(self, num_rows: int, row_bytes: int) -> torch.Tensor:
        """Allocate host memory that the GPU copies from and to by itself -> uint8 [num_rows, row_bytes]."""
        return torch.zeros(num_rows, row_bytes, dtype=torch.uint8, pin_memory=True)

    def copy_to_host(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Start to copy a tensor to the host on the compute stream -> (host tensor, event of its arrival)."""
        arriving = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        arriving.copy_(tensor, non_blocking=True)
        return arriving, self.compute_stream.record_event()

    def copy_from_host(self, array: np.ndarray) -> torch.Tensor:
        """Copy an array to the GPU on the compute stream; the host does not wait."""
        pinned = torch.from_numpy(array).pin_memory()  # for other memory CUDA may wait for the stream, from 64 KB on
        return pinned.to(self.torch_device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until all streams have done their work."""
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def record_streams(self) -> Iterator[list[StreamSpan]]:
        """Record what the streams do within the with-block -> list, which holds it when the block has ended.

        By CUPTI, through torch's profiler: kernels and copies of this process alone.
        """
        spans: list[StreamSpan] = []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            yield spans
            self.synchronize()
        epoch_seconds = time.time() - time.perf_counter()  # the profiler's times are since 1970
        spans += list_stream_spans(profile.profiler.kineto_results.events(), epoch_seconds)

    def read_memory(self) -> tuple[str, int]:
        """Return the GPU's name, the same for all its ranks, and its free bytes."""
        name = str(torch.cuda.get_device_properties(self.torch_device).uuid)
        return name, torch.cuda.mem_get_info(self.torch_device)[0]


def import_cupy() -> Any:
    """Return the module of CuPy; raise ClusterError without its libraries, or a place for its cache."""
    try:
        import cupy
    except ImportError as error:
        raise ClusterError(f'[comm] device: CuPy cannot be imported: {error}; "host" needs none') from error
    except OSError as error:  # it makes a folder for its cache
        raise ClusterError(f"[comm] device: CuPy cannot begin: {error}; CUPY_CACHE_DIR may name a folder") from error
    return cupy


def compile_kernel(cupy: Any, source: str, name: str, options: tuple[str, ...]) -> Callable[..., None]:
    """Return a kernel for the GPU in use, to call with (grid, block, arguments) on CuPy's current stream."""
    kernel = cupy.RawKernel(source, name, options)
    kernel.compile()
    return kernel


def describe_gpu(index: int) -> str:
    """Return a GPU's model and memory."""
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"


def has_grouped_gemm(torch_device: torch.device) -> bool:
    """Return True if torch's grouped GEMM, where it has one, runs on a device."""
    return torch_device.type != "cuda" or torch.cuda.get_device_capability(torch_device) >= _FIRST_GROUPED
