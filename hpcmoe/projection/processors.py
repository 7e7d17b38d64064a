"""What processors can do at most: a sheet of GPUs by name, or figures given by hand.

Peaks are of dense products, without sparsity, by the makers' data sheets; a step reaches a part of them, so that costs
estimated from a sheet have a wide range.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hpcmoe.errors import ConfigError
from hpcmoe.messages import show_value, suggest


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What computes for one rank: a GPU, or a core."""

    name: str
    flops: Mapping[str, float]  # FLOP/s at most, by precision: "float32", "bfloat16", "float8"
    memory_bytes_per_second: float
    memory_bytes: float
    link_bytes_per_second: float  # one way, to another in its node
    is_gpu: bool
    source: str  # where the figures came from

    def peak(self, dtype: str) -> float:
        """Return the FLOP/s of a precision, of the next wider one where it has none of its own."""
        wider = ("float8", "bfloat16", "float32")
        known = [name for name in wider[wider.index(dtype) :] if name in self.flops]
        return self.flops[known[0]] if known else max(self.flops.values())


# TFLOP/s of float32, bfloat16, float8 (0: none); memory in TB/s and GB; links within a node in GB/s, one way.
_SHEET = {
    "V100": (15.7, 0, 0, 0.9, 32, 150, "NVIDIA V100 SXM2 data sheet"),
    "A100": (19.5, 312, 0, 2.039, 80, 300, "NVIDIA A100 80GB SXM data sheet"),
    "A100-40GB": (19.5, 312, 0, 1.555, 40, 300, "NVIDIA A100 40GB SXM data sheet"),
    "A100-PCIe": (19.5, 312, 0, 1.935, 80, 32, "NVIDIA A100 80GB PCIe data sheet"),
    "A40": (37.4, 149.7, 0, 0.696, 48, 32, "NVIDIA A40 data sheet"),
    "L4": (30.3, 121, 242.5, 0.3, 24, 32, "NVIDIA L4 data sheet"),
    "L40S": (91.6, 362, 733, 0.864, 48, 32, "NVIDIA L40S data sheet"),
    "H100": (67, 989.4, 1978.9, 3.35, 80, 450, "NVIDIA H100 SXM data sheet"),
    "H100-PCIe": (51, 756, 1513, 2.0, 80, 64, "NVIDIA H100 PCIe data sheet"),
    "H800": (67, 989.4, 1978.9, 3.35, 80, 200, "NVIDIA H100 SXM data sheet; links: arXiv:2412.19437"),
    "H20": (44, 148, 296, 4.0, 96, 450, "NVIDIA H20 data sheet"),
    "H200": (67, 989.4, 1978.9, 4.8, 141, 450, "NVIDIA H200 SXM data sheet"),
    "GH200": (67, 989.4, 1978.9, 4.0, 96, 450, "NVIDIA GH200 data sheet"),
    "B200": (75, 2250, 4500, 8.0, 180, 900, "NVIDIA DGX B200 data sheet, an eighth"),
    "GB200": (80, 2500, 5000, 8.0, 186, 900, "NVIDIA GB200 NVL72 data sheet"),
    "MI250X": (47.9, 383, 0, 3.2768, 128, 50, "AMD Instinct MI250X data sheet"),
    "MI300X": (163.4, 1307.4, 2614.9, 5.3, 192, 448, "AMD Instinct MI300X data sheet"),
    "MI325X": (163.4, 1307.4, 2614.9, 6.0, 256, 448, "AMD Instinct MI325X data sheet"),
    "MI355X": (157.3, 2516.6, 5033.2, 8.0, 288, 538, "AMD Instinct MI355X data sheet"),
}  # fmt: skip


def find_gpu(name: str, where: str) -> Processor:
    """Find a GPU of the sheet by its name, in any case. Raises ConfigError that begins with `where`."""
    known = {entry.casefold(): entry for entry in _SHEET}
    if name.casefold() not in known:
        raise ConfigError(f"{where} = {show_value(name)}: is not in the sheet{suggest(name, _SHEET)}; or give flops, "
                          "memory_rate and memory")  # fmt: skip
    *figures, source = _SHEET[known[name.casefold()]]
    single, half, quarter, rate, size, link = (float(figure) for figure in figures)
    peaks = {"float32": single, "bfloat16": half, "float8": quarter}
    return Processor(
        name=known[name.casefold()],
        flops={dtype: teraflops * 1e12 for dtype, teraflops in peaks.items() if teraflops},
        memory_bytes_per_second=rate * 1e12,
        memory_bytes=size * 1e9,
        link_bytes_per_second=link * 1e9,
        is_gpu=True,
        source=str(source),
    )
