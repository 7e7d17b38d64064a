"""The sections of run.toml: one frozen dataclass each, every key with its type and its allowed values."""

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Interval, MaxLen, MinLen

from hpcmoe.float32 import InFloat32
from hpcmoe.validate import STRICT

_Count = Annotated[int, Interval(ge=1, lt=2**31)]
_CountOrZero = Annotated[int, Interval(ge=0, lt=2**31)]  # 0 turns the thing off, or lets the program choose
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Positive32 = Annotated[float, Gt(0), InFloat32()]
NotNegative32 = Annotated[float, Ge(0), InFloat32()]
UpToOne32 = Annotated[float, Interval(ge=0, le=1), InFloat32()]
BelowOne32 = Annotated[float, Interval(ge=0, lt=1), InFloat32()]

Section = TypeVar("Section")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def section(cls: type[Section]) -> type[Section]:
    """Make a section: a frozen, slotted dataclass whose values pydantic checks strictly."""
    cls.__pydantic_config__ = STRICT  # type: ignore[attr-defined]  # pydantic's own name, which dataclass keeps
    cls.__annotations__["__pydantic_config__"] = ClassVar
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


@section
class RunConfig:
    """What to do, and under which name."""

    name: Annotated[str, MinLen(1), MaxLen(255)] = "run"
    mode: Literal["train", "infer"] = "train"
    steps: _Count = 120
    warmup_steps: _CountOrZero = 10
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    output: Annotated[str, MinLen(1), MaxLen(4095)] = "out"
    threads_per_rank: Annotated[int, Interval(ge=0, le=4096)] = 0
    log_seconds: NotNegative = 10.0
    log_json: bool = False
    tensorboard: bool = False
    trace: Annotated[str, MaxLen(64)] = ""
    trace_ranks: _Count = 64

    @property
    def traced_steps(self) -> range | None:
        """Return the steps that trace names: none for an empty text, None where it is not FIRST:LAST."""
        if not self.trace:
            return range(0)
        found = re.fullmatch(r"([1-9]\d{0,9}):([1-9]\d{0,9})", self.trace, re.ASCII)
        return range(int(found[1]), int(found[2]) + 1) if found else None


@section
class ModelConfig:
    """The network: its sizes, or the folder of one that has its own."""

    source: Literal["own", "hf"] = "own"
    path: Annotated[str, MaxLen(4095)] = ""
    make_tiny: Annotated[str, MaxLen(255)] = ""
    trains: Literal["all", "experts", "router", "lora"] = "all"
    lora_rank: _Count = 8
    lora_alpha: Positive32 = 16.0
    lora_targets: tuple[Annotated[str, MinLen(1)], ...] = ()
    aux_loss: bool = False
    gradient_checkpointing: bool = False
    hidden: _Count = 64
    feed_forward: _Count = 128
    num_layers: _Count = 2
    num_experts: _Count = 16
    top_k: _Count = 2
    attention: bool = True
    num_heads: _Count = 4
    sequence_length: _Count = 64
    dtype: Literal["float32", "bfloat16"] = "float32"


@section
class ClusterConfig:
    """Where the run's ranks are, and what joins them."""

    links: str = "measure"
    measure_seconds: Positive = 2.0
    measure_bytes: Annotated[int, Interval(ge=1, lt=2**63)] = 2_000_000_000
    racks: tuple[str, ...] = ()
    memory_bytes_per_node: Annotated[int, Interval(ge=0, lt=2**63)] = 0


@section
class ParallelConfig:
    """How the ranks share the network: the three sizes of the mesh."""

    data: _Count = 1
    expert: _CountOrZero = 0
    tensor: _CountOrZero = 0


@section
class CommConfig:
    """What carries rows between ranks."""

    device: Literal["auto", "host", "cuda"] = "auto"
    transport: Literal["auto", "nccl", "mpi"] = "auto"
    buffers: Literal["auto", "direct", "staged"] = "auto"
    shared_memory: bool = True
    once_per_node: Literal["auto", "on", "racks", "off"] = "auto"
    message_rows: _CountOrZero = 0
    buffer_factor: Annotated[float, Interval(ge=1, le=1000)] = 1.5
    pool_bytes: Annotated[int, Interval(ge=1, lt=2**63)] = 1_000_000_000


@section
class DispatchConfig:
    """How tokens choose experts."""

    renormalize: bool = True
    aux_loss_weight: NotNegative32 = 0.05
    z_loss_weight: NotNegative32 = 0.001
    load_feedback: UpToOne32 = 0.2
    load_feedback_on: Literal["selection", "both"] = "selection"
    load_window_steps: _Count = 10
    bias_update_speed: UpToOne32 = 0.0
    capacity_factor: Annotated[float, Interval(ge=0, le=1e6)] = 0.0


@section
class ExpertsConfig:
    """What an expert is."""

    kind: Literal["gelu", "relu", "swiglu"] = "gelu"
    bias: bool = False
    gemm_rows: _CountOrZero = 0


@section
class PipelineConfig:
    """How micro-batches follow each other."""

    micro_batches: _Count = 2
    schedule: Literal["serial", "overlap", "arrival"] = "overlap"
    in_flight: _Count = 2
    deterministic: bool = True

    @property
    def num_in_flight(self) -> int:
        """Return the number of micro-batches under way at once."""
        return 1 if self.schedule == "serial" else min(self.in_flight, self.micro_batches)


@section
class PlacementConfig:
    """Which rank holds which experts at first, and what is known of their loads."""

    method: str = "packed"
    objective: Literal["links", "ports", "step"] = "step"
    count_latency: bool = False
    search_seconds: Positive = 1.0
    search_iterations: _Count = 20000
    compare_eplb: bool = False
    loads: str = "uniform"
    seconds_per_token: NotNegative = 0.0
    replicate: bool = False
    spare_slots_per_rank: Annotated[int, Interval(ge=0, le=1024)] = 0


@section
class RebalanceConfig:
    """When experts move to where the tokens measured would have them."""

    every: _CountOrZero = 0
    horizon: _CountOrZero = 0
    margin: NotNegative = 0.3
    moves: _Count = 8


@section
class DataConfig:
    """The text: files of it."""

    files: Annotated[tuple[str, ...], MinLen(1)] = ("{stdlib}/*.py", "{stdlib}/*/*.py")
    exclude: tuple[str, ...] = ("*/site-packages/*", "*/dist-packages/*", "*/test/*")
    text_field: Annotated[str, MaxLen(255)] = ""
    validation_share: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    batch_sequences: _Count = 64
    validation_sequences: _Count = 128


@section
class TrainConfig:
    """The optimizer."""

    learning_rate: Positive32 = 0.01
    learning_rate_schedule: Literal["constant", "linear", "cosine", "warmup-stable-decay"] = "constant"
    learning_rate_warmup_steps: _CountOrZero = 20
    learning_rate_decay_steps: _CountOrZero = 0
    learning_rate_final: UpToOne32 = 0.1
    weight_decay: NotNegative32 = 0.01
    beta1: BelowOne32 = 0.9
    beta2: BelowOne32 = 0.99
    epsilon: Positive32 = 1e-8
    clip_norm: NotNegative32 = 1.0
    bucket_bytes: Annotated[int, Interval(ge=0, lt=2**31)] = 4_000_000
    shard_optimizer: bool = False
    check_every: _CountOrZero = 100
    validate_every: _CountOrZero = 40


@section
class WriteConfig:
    """What is kept."""

    checkpoint_every: _CountOrZero = 60
    checkpoints_kept: _Count = 2
    asynchronous: bool = False
    hf_every: _CountOrZero = 0
    activations_of_layers: tuple[_CountOrZero, ...] = ()
    activations_every: _Count = 100


@section
class RestartConfig:
    """How a run ends when it is told to, and goes on."""

    grace_seconds: Positive = 120.0
    wall_seconds: NotNegative = 0.0
    tries: _CountOrZero = 3
    mirror_every: _CountOrZero = 0
    hang_seconds: Literal["auto"] | NotNegative = "auto"

    @property
    def hang_limit(self) -> float | None:
        """Return hang_seconds, None where the steps' times give it."""
        return None if self.hang_seconds == "auto" else self.hang_seconds
