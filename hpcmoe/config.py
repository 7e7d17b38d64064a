"""run.toml as a Config: all its sections, read from a file and `--set`, each key checked."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any, cast, get_type_hints

from hpcmoe.contradictions import find_contradictions
from hpcmoe.errors import ConfigError
from hpcmoe.float32 import find_range_error
from hpcmoe.messages import is_one_line, join_lines, one_line, show_value
from hpcmoe.overrides import kind_of, name_option, parse_override
from hpcmoe.paths import expand_paths
from hpcmoe.reading import read_toml
from hpcmoe.sections import (
    ClusterConfig,
    CommConfig,
    DataConfig,
    DispatchConfig,
    ExpertsConfig,
    ModelConfig,
    ParallelConfig,
    PipelineConfig,
    PlacementConfig,
    RebalanceConfig,
    RestartConfig,
    RunConfig,
    TrainConfig,
    WriteConfig,
    section,
)
from hpcmoe.validate import validate


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """What a network is: the sections that shape it, the seed of its weights, and the use it is built for."""

    model: ModelConfig
    dispatch: DispatchConfig
    experts: ExpertsConfig
    seed: int  # of the weights as drawn
    trains: bool  # parameters in float32, with gradients and moments; else in the precision of [model] dtype


@section
class Config:
    """A whole run.toml: its sections, each key already checked."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    rebalance: RebalanceConfig = field(default_factory=RebalanceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    write: WriteConfig = field(default_factory=WriteConfig)
    restart: RestartConfig = field(default_factory=RestartConfig)

    @property
    def spec(self) -> NetworkSpec:
        """Return what the chapters below run/ need to know of the network."""
        trains = self.run.mode == "train"
        return NetworkSpec(
            model=self.model, dispatch=self.dispatch, experts=self.experts, seed=self.run.seed, trains=trains
        )


def read_config(path: str | PathLike, overrides: Sequence[str] = ()) -> tuple[Config, str]:
    """Read and check a TOML file and `section.key=value` overrides -> (Config, its text with the overrides).

    Raises ConfigError with one line per error: file or option, section, key, value, and what is allowed.
    """
    tree, text = read_toml(path)

    # Apply the overrides, and record where each value came from.
    kinds = {(name, key): kind_of(annotation) for name, key, annotation in list_keys()}
    source_of_key: dict[tuple[str, ...], str] = {}
    for override in overrides:
        name, key, value = parse_override(override, kinds)
        if name not in tree:
            source_of_key[name,] = name_option(override)
        if not isinstance(tree.setdefault(name, {}), dict):
            raise ConfigError(f"{one_line(path)}: {name} = {show_value(tree[name])}: must be a section, [{name}]")
        tree[name][key] = value
        source_of_key[name, key] = name_option(override)

    def source_of(*keys: str) -> str:
        return source_of_key.get(keys, one_line(path))

    config = expand_paths(make_config(tree, source_of), source_of)
    return config, text + "".join(f"\n# --set {override}" for override in overrides)


@functools.cache
def list_keys() -> tuple[tuple[str, str, object], ...]:
    """Return every key of run.toml as (section, key, annotation)."""
    return tuple(
        (part.name, key.name, get_type_hints(part.type, include_extras=True)[key.name])
        for part in fields(cast(Any, Config))
        for key in fields(cast(Any, part.type))
    )


def make_config(tree: dict[str, Any], source_of: Callable[..., str]) -> Config:
    """Check a parsed TOML tree -> Config. Raises ConfigError with one line per error."""
    config = validate(Config, tree, source_of)
    lines = [
        f"{source_of(name, key)}: [{name}] {key} = {show_value(getattr(getattr(config, name), key))}: {what}"
        for (name, key), what in [*find_invalid_values(config), *find_contradictions(config)]
    ]
    if lines:
        raise ConfigError(join_lines(lines))
    return config


def find_invalid_values(config: Config) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield ((section, key), what is wrong) of numbers that float32 cannot hold, and of texts of several lines."""
    for name, key, annotation in list_keys():
        value = getattr(getattr(config, name), key)
        if what := find_range_error(value, annotation):
            yield (name, key), what
        texts = value if isinstance(value, tuple) else (value,)
        if not all(is_one_line(text) for text in texts if isinstance(text, str)):
            yield (name, key), "must hold no line breaks or other control characters"
