"""run.toml: one frozen dataclass per section, every key with its unit and its allowed values."""

import difflib
import json
import pathlib
import tomllib
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from hpcmoe.contradictions import contradictions
from hpcmoe.errors import ConfigError
from hpcmoe.paths import expand_paths

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # what pydantic is to be picky about
Count = Annotated[int, Interval(ge=1, lt=2**31)]
CountOrNone = Annotated[int, Interval(ge=0, lt=2**31)]  # 0 turns the thing off, or lets the program choose
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(gt=0, lt=1)]
Matrix = tuple[tuple[float, ...], ...]


def section(cls):
    """Make a section: a frozen, slotted dataclass whose values pydantic checks strictly."""
    cls.__pydantic_config__ = STRICT
    cls.__annotations__["__pydantic_config__"] = ClassVar
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


@section
class Run:
    """What to do, and under which name."""

    name: Annotated[str, MinLen(1)] = "run"
    mode: Literal["train", "infer"] = "train"
    steps: Count = 120
    warmup_steps: CountOrNone = 10
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    output: Annotated[str, MinLen(1)] = "out"
    threads_per_rank: Annotated[int, Interval(ge=0, le=4096)] = 0


@section
class Model:
    """The sizes that all chapters share."""

    hidden: Count = 64
    feed_forward: Count = 128
    num_layers: Count = 2
    num_experts: Count = 16
    top_k: Count = 2
    attention: bool = True
    num_heads: Count = 4
    sequence_length: Count = 64
    dtype: Literal["float32", "bfloat16"] = "float32"


@section
class Cluster:
    """Where the run's ranks are, what joins them, and how experts are laid on them."""

    data_parallel: Count = 1
    expert_parallel: CountOrNone = 0
    tensor_parallel: CountOrNone = 0
    links: Literal["measure", "config", "file"] = "measure"
    measure_seconds: Positive = 2.0
    measure_bytes: Annotated[int, Interval(ge=1, lt=2**63)] = 2_000_000_000
    links_file: str = ""
    bytes_per_second: Matrix = ()
    latency_seconds: Matrix = ()
    egress_bytes_per_second: tuple[float, ...] = ()
    ingress_bytes_per_second: tuple[float, ...] = ()
    uplink_bytes_per_second: tuple[float, ...] = ()
    rack_of_node: tuple[str, ...] = ()
    memory_bytes_per_node: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    placement: Literal["packed", "contiguous", "eplb", "file"] = "packed"
    placement_file: str = ""
    objective: Literal["links", "ports", "step"] = "step"
    count_latency: bool = False
    search_seconds: Positive = 1.0
    search_iterations: Count = 20000
    compare_eplb: bool = False
    probability: Literal["uniform", "config", "file"] = "uniform"
    expert_probability: Matrix = ()
    loads_file: str = ""
    seconds_per_token: NotNegative = 0.0
    replicate: bool = False
    spare_slots_per_rank: Annotated[int, Interval(ge=0, le=1024)] = 0
    rebalance_every: CountOrNone = 0
    rebalance_horizon: CountOrNone = 0
    rebalance_margin: NotNegative = 0.3
    rebalance_moves: Count = 8


@section
class Comm:
    """What carries bytes."""

    device: Literal["auto", "host", "cuda"] = "auto"
    transport: Literal["auto", "nccl", "mpi"] = "auto"
    buffers: Literal["auto", "direct", "staged"] = "auto"
    shared_memory: bool = True
    once_per_node: Literal["auto", "on", "racks", "off"] = "auto"
    message_rows: CountOrNone = 0
    buffer_factor: Annotated[float, Interval(ge=1, le=1000)] = 1.5
    pool_bytes: Annotated[int, Interval(ge=1, lt=2**63)] = 1_000_000_000


@section
class Dispatch:
    """How tokens choose experts."""

    renormalize: bool = True
    aux_loss_weight: NotNegative = 0.05
    z_loss_weight: NotNegative = 0.001
    load_feedback: Annotated[float, Interval(ge=0, le=1)] = 0.2
    load_feedback_on: Literal["selection", "both"] = "selection"
    load_window_steps: Count = 10
    bias_update_speed: Annotated[float, Interval(ge=0, le=1)] = 0.0
    capacity_factor: Annotated[float, Interval(ge=0, le=1e6)] = 0.0


@section
class Experts:
    """What an expert is."""

    kind: Literal["gelu", "relu", "swiglu"] = "gelu"
    bias: bool = False
    gemm_rows: CountOrNone = 0


@section
class Pipeline:
    """How micro-batches follow each other."""

    micro_batches: Count = 2
    schedule: Literal["serial", "overlap", "arrival"] = "overlap"
    in_flight: Count = 2
    deterministic: bool = True


@section
class Data:
    """The text: bytes of files."""

    files: Annotated[tuple[str, ...], MinLen(1)] = ("{stdlib}/*.py", "{stdlib}/*/*.py")
    exclude: tuple[str, ...] = ("*/site-packages/*", "*/dist-packages/*", "*/test/*")
    validation_share: Share = 0.1
    batch_sequences: Count = 64
    validation_sequences: Count = 128


@section
class Train:
    """The optimizer."""

    learning_rate: Positive = 0.01
    learning_rate_warmup_steps: CountOrNone = 20
    weight_decay: NotNegative = 0.01
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    epsilon: Positive = 1e-8
    clip_norm: NotNegative = 1.0
    bucket_bytes: Annotated[int, Interval(ge=0, lt=2**31)] = 4_000_000
    shard_optimizer: bool = False
    check_every: CountOrNone = 100
    validate_every: CountOrNone = 40


@section
class Write:
    """What is kept."""

    checkpoint_every: CountOrNone = 60
    checkpoints_kept: Count = 2
    asynchronous: bool = False
    activations_of_layers: tuple[CountOrNone, ...] = ()
    activations_every: Count = 100


@section
class Config:
    """A whole run.toml: its sections, each key already checked."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    cluster: Cluster = field(default_factory=Cluster)
    comm: Comm = field(default_factory=Comm)
    dispatch: Dispatch = field(default_factory=Dispatch)
    experts: Experts = field(default_factory=Experts)
    pipeline: Pipeline = field(default_factory=Pipeline)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    write: Write = field(default_factory=Write)


def read_config(path, overrides=()):
    """Read and check a TOML file and `section.key=value` overrides -> (Config, its text with the overrides).

    Raises ConfigError with one line a fault: file, section, key, value, and what is allowed.
    """
    text = read_text(path)
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as fault:  # tomllib tells more than its own errors
        raise ConfigError(f"{path}: not TOML: {fault}") from None

    # Lay the overrides over the file, remembering where each value came from.
    source_of_key = {}
    for override in overrides:
        name, key, value = parse_override(override)
        if name not in tree:
            source_of_key[name,] = f"--set {override}"
        if not isinstance(tree.setdefault(name, {}), dict):
            raise ConfigError(f"{path}: {name} = {tree[name]!r}: must be a section, [{name}]")
        tree[name][key] = value
        source_of_key[name, key] = f"--set {override}"

    config = make_config(tree, lambda *keys: source_of_key.get(keys, str(path)))
    config = expand_paths(config, lambda *keys: source_of_key.get(keys, str(path)))
    return config, text + "".join(f"\n# --set {override}" for override in overrides)


def read_text(path):
    """Read a text file, or say in one line why it cannot be read."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read: {fault.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None


def parse_override(override):
    """Split `section.key=value` -> (section, key, value); the value is TOML, or a bare string."""
    name, equals, value = override.partition("=")
    name, dot, key = name.strip().partition(".")
    if not (name and dot and key and equals):
        raise ConfigError(f"--set {override}: must look like section.key=value")
    try:
        return name, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, key, value.strip()


def make_config(tree, source_of):
    """Check a parsed TOML tree whole -> Config; ConfigError lists every fault in it."""
    from pydantic import TypeAdapter, ValidationError  # rank 0 alone pays for this import

    try:
        config = TypeAdapter(Config).validate_json(json.dumps(tree, default=lambda date: {"date": str(date)}))
    except ValidationError as invalid:
        raise ConfigError("\n".join(explain(fault, tree, source_of) for fault in invalid.errors())) from None
    faults = [f"{source_of(*keys)}: {text}" for keys, text in contradictions(config)]
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def explain(fault, tree, source_of):
    """Make one line of one of pydantic's errors: where it is, what stands there, what may stand there."""
    name, *inner = fault["loc"]
    if not inner:
        known, what = [f.name for f in fields(Config)], f"[{name}]"
        return f"{source_of(name)}: {what}: " + (
            f"unknown section{suggest(name, known)}" if name not in known else f"{tree[name]!r}: must be a section"
        )
    key = inner[0]
    what = f"{source_of(name, key)}: [{name}] {key} = {tree[name][key]!r}"
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [f.name for f in fields(type(getattr(Config(), name)))]
        return f"{what}: unknown key{suggest(key, known)}"
    entry = f"entry {list(inner[1:])}: " if len(inner) > 1 else ""
    return f"{what}: {entry}{fault['msg'].replace('Input should', 'must')}"


def suggest(word, known):
    """Name the nearest known word, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(known)}"
