"""The loads of experts: even, by a power law, or of a file: a run's record, probabilities, another engine's counts.

SGLang's expert distribution recorder saves logical_count [steps, layers, experts] by torch.save; vLLM's expert-parallel
load balancer keeps window_expert_load and its like [steps, layers, replicas] beside physical_to_logical_map, which says
of which expert each replica is. Both are read as JSON, .npy or .pt; what counts replicas is summed over each expert's.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcmoe.config import ModelConfig
from hpcmoe.errors import ConfigError, HpcmoeError
from hpcmoe.messages import format_index, one_line, show_value
from hpcmoe.placement.demand import Loads
from hpcmoe.placement.files.arrays import NPY_MARK, read_npy
from hpcmoe.placement.files.torch_file import MOST_NUMBERS, read_torch
from hpcmoe.reading import is_number, read_bytes, read_json

COUNTS = (
    "logical_count", "logical_counts", "window_expert_load", "expert_load_window", "expert_load", "expert_load_pass",
    "tokens_per_expert", "global_physical_count", "physical_count",
)  # fmt: skip
_REPLICA_MAPS = ("physical_to_logical_map", "physical_to_logical", "phy2log", "last_physical_to_logical_map")
EVEN = ("even", "uniform")
_MOST_EXPONENT = 10.0
_SUM_TOLERANCE = 1e-6  # by which a row of probabilities may miss 1
_TORCH_MARK = b"PK\x03\x04"
ReadRecord = Callable[[str], Loads]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGrid:
    """The layers and experts that loads are to be of, and what the user calls their numbers."""

    num_layers: int  # that have experts
    num_experts: int
    layers_key: str = "layers"
    experts_key: str = "experts"


def find_loads(loads: str, model: ModelConfig, read_record: ReadRecord) -> Loads:
    """Return the loads that [placement] loads names; ConfigError when they are not those of [model].

    read_record(path) -> Loads of a run's record.
    """
    if loads == "uniform":
        return make_even(model.num_layers, model.num_experts)
    grid = ExpertGrid(
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        layers_key="[model] num_layers",
        experts_key="[model] num_experts",
    )
    try:
        return read_load_file(loads, grid, read_record)
    except HpcmoeError as error:
        raise type(error)(f"[placement] loads = {error}") from None


def choose_loads(word: str, grid: ExpertGrid, top_k: int, read_record: ReadRecord) -> tuple[Loads, str]:
    """Return what a word asks for -> (Loads, what they are): `even`, a power law's exponent such as 1.2, or a file.

    A file whose name is a number needs its folder: ./1.2. Raises ConfigError or what read_record raises.
    """
    if word in EVEN:
        return make_even(grid.num_layers, grid.num_experts), "even"
    try:
        exponent = float(word)
    except ValueError:
        return read_load_file(word, grid, read_record), f"those of {one_line(word)}"
    if not 0 <= exponent <= _MOST_EXPONENT:
        raise ConfigError(
            f"{one_line(word)}: an exponent must be 0 to {_MOST_EXPONENT:g}; a file's name needs its folder"
        )
    return make_power_law(grid, exponent, top_k), f"those of a power law of exponent {exponent:g}"


def make_even(num_layers: int, num_experts: int) -> Loads:
    """Return loads alike for all experts."""
    return Loads(tokens=np.ones((num_layers, 1, num_experts)), node_names=())


def make_power_law(grid: ExpertGrid, exponent: float, top_k: int) -> Loads:
    """Return loads where the r-th most used of a layer's experts has r^-exponent of the first's.

    None has more than 1 / top_k, for a token chooses it once. Which expert is the r-th differs by layer, at random by
    one seed.
    """
    shares = np.arange(1, grid.num_experts + 1, dtype=np.float64) ** -exponent
    shares /= shares.sum()
    most = 1 / min(top_k, grid.num_experts)
    for _ in range(grid.num_experts):  # share what is beyond the most among the others, until none is
        above = shares >= most
        if above.sum() * most >= 1 or shares.max() <= most * (1 + 1e-12):
            break
        shares[~above] *= (1 - above.sum() * most) / shares[~above].sum()
        shares[above] = most
    drawn = np.random.default_rng(0)
    tokens = np.stack([drawn.permutation(shares) for _ in range(grid.num_layers)])
    return Loads(tokens=tokens[:, None], node_names=())


def read_load_file(path: str, grid: ExpertGrid, read_record: ReadRecord) -> Loads:
    """Read the loads of a file -> Loads of these layers and experts. Raises ConfigError, or what read_record raises."""
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        content = read_json(path)
        if not (isinstance(content, dict) and any(name in content for name in COUNTS)):
            return Loads(tokens=check_rows(content, grid, path), node_names=())
        return make_counted_loads(path, content, grid)
    if suffix in (".npy", ".pt", ".pth"):
        return make_counted_loads(path, read_arrays(path, suffix), grid)
    return check_loads(read_record(path), grid, path)


def read_arrays(path: str, suffix: str) -> Any:
    """Read a file of NumPy or torch -> an array, or a dict that has some. Raises ConfigError."""
    content = read_bytes(path)
    if suffix == ".npy" or content.startswith(NPY_MARK):
        return read_npy(path, content, MOST_NUMBERS, "numbers")
    if not content.startswith(_TORCH_MARK):
        raise ConfigError(
            f"{one_line(path)}: is no zip archive as torch.save makes: save it anew, or its counts as .npy or .json"
        )
    tensors = read_torch(path, content)
    if isinstance(tensors, dict):  # a list may hold itself, or another a thousand times
        return {name: value for name, value in tensors.items() if isinstance(value, np.ndarray)}
    if not isinstance(tensors, np.ndarray):
        raise ConfigError(f"{one_line(path)}: must hold a tensor, or a dict of some")
    return tensors


def make_counted_loads(path: str, content: Any, grid: ExpertGrid) -> Loads:
    """Make Loads of counts [L, E] or [steps, L, E], alone or under a known name. Raises ConfigError."""
    where, counts, replicas = f"{one_line(path)}: the array", content, None
    if isinstance(content, dict):
        name = next((name for name in COUNTS if name in content), None)
        if name is None:
            known = f"{', '.join(COUNTS[:-1])} or {COUNTS[-1]}"
            raise ConfigError(f"{one_line(path)}: has {show_value(sorted(map(str, content)))}: needs {known}")
        where, counts = f"{one_line(path)}: {name}", content[name]
        maps = [key for key in _REPLICA_MAPS if key in content]
        if maps and not name.startswith("logical"):
            replicas = make_numbers(f"{one_line(path)}: {maps[0]}", content[maps[0]])
    tokens = sum_steps(where, make_numbers(where, counts))
    if replicas is not None:
        tokens = sum_replicas(where, tokens, replicas, grid)
    return Loads(tokens=fit_grid(where, tokens, grid)[:, None], node_names=())


def make_numbers(where: str, value: Any) -> np.ndarray:
    """Make an array of nested lists of numbers, which may be one already. Raises ConfigError."""
    try:
        array = np.array(value) if isinstance(value, list) else value
    except (ValueError, OverflowError):
        array = None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf" or array.ndim not in (1, 2, 3):
        shown = f"of {array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else show_value(value)
        raise ConfigError(f"{where} must be numbers [layers][experts] or [steps][layers][experts], is {shown}")
    wrong = ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        index = tuple(np.argwhere(wrong)[0].tolist())
        raise ConfigError(f"{where}{format_index(index)} = {array[index]:g}: must be finite and 0 or above")
    return array


def sum_steps(where: str, counts: np.ndarray) -> np.ndarray:
    """Sum counts [L, E], [E] or [steps, L, E] over steps -> float64 [L, E]. Raises ConfigError."""
    if counts.size == 0:
        raise ConfigError(f"{where} is empty: {list(counts.shape)}")
    with np.errstate(over="ignore"):
        tokens = counts.sum(axis=0, dtype=np.float64) if counts.ndim == 3 else np.atleast_2d(counts).astype(np.float64)
        is_finite = np.isfinite(tokens.sum(axis=1)).all()
    if not is_finite:
        raise ConfigError(f"{where}: its sums are beyond what numbers of 64 bits hold")
    return tokens


def sum_replicas(where: str, tokens: np.ndarray, replicas: np.ndarray, grid: ExpertGrid) -> np.ndarray:
    """Sum the tokens of replicas [L, S] by the expert of each, replicas [L, S] or [S] -> [L, E]. Raises ConfigError."""
    experts = np.atleast_2d(replicas)
    if experts.shape[-1] != tokens.shape[1] or len(experts) not in (1, len(tokens)) or experts.ndim != 2:
        raise ConfigError(f"{where} is {list(tokens.shape)}, the map of its replicas {list(replicas.shape)}")
    if (experts != np.floor(experts)).any() or experts.max() >= grid.num_experts:
        raise ConfigError(f"{where}: the map of its replicas must hold numbers below {grid.num_experts}, of experts")
    summed = np.zeros((len(tokens), grid.num_experts))
    layers = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
    np.add.at(summed, (layers, np.broadcast_to(experts.astype(np.int64), tokens.shape)), tokens)
    return summed


def fit_grid(where: str, tokens: np.ndarray, grid: ExpertGrid) -> np.ndarray:
    """Fit tokens of a file to the layers: one row is for all, rows of zeros are of layers without experts -> [L, E].

    Raises ConfigError.
    """
    if tokens.shape[1] != grid.num_experts:
        raise ConfigError(
            f"{where} has {tokens.shape[1]} experts, {grid.experts_key} = {grid.num_experts}; counts of replicas need "
            f"{_REPLICA_MAPS[0]} beside them"
        )
    used = tokens.sum(axis=1) > 0
    if len(tokens) > grid.num_layers and used.sum() == grid.num_layers:
        tokens, used = tokens[used], used[used]
    if len(tokens) not in (1, grid.num_layers):
        raise ConfigError(f"{where} has {len(tokens)} layers, {grid.layers_key} = {grid.num_layers}")
    if not used.all():
        raise ConfigError(f"{where}: layer {int(np.argmin(used))} is without tokens")
    return np.broadcast_to(tokens, (grid.num_layers, grid.num_experts))


def check_rows(rows: Any, grid: ExpertGrid, path: str | os.PathLike) -> np.ndarray:
    """Check a file's probabilities, a row or one a layer -> [L, 1, E], or ConfigError naming row and sum."""
    if not (isinstance(rows, list) and all(isinstance(row, list) for row in rows)):
        raise ConfigError(f"{path}: must be a list of rows of numbers")
    if len(rows) not in (1, grid.num_layers):
        raise ConfigError(f"{path}: has {len(rows)} rows, must have 1 or {grid.layers_key} = {grid.num_layers}")
    for number, row in enumerate(rows):
        if len(row) != grid.num_experts:
            raise ConfigError(f"{path}: row [{number}] has {len(row)} entries, {grid.experts_key} = {grid.num_experts}")
        for expert, entry in enumerate(row):
            if not is_number(entry):
                raise ConfigError(f"{path}: entry [{number}][{expert}] = {show_value(entry)}, must be a number")
        if min(row) < 0:
            raise ConfigError(f"{path}: entry [{number}][{row.index(min(row))}] = {min(row):g}, must be 0 or above")
        total = sum(map(float, row))  # of whole numbers alone it may be beyond float64
        if not abs(total - 1) <= _SUM_TOLERANCE:
            raise ConfigError(f"{path}: row [{number}] sums to {total:.8g}, must sum to 1")
    return np.broadcast_to(np.array(rows, np.float64)[:, None], (grid.num_layers, 1, grid.num_experts))


def check_loads(loads: Loads, grid: ExpertGrid, path: str) -> Loads:
    """Check that recorded loads are of these layers and experts -> the Loads, or ConfigError."""
    keys = (("num_layers", grid.layers_key, grid.num_layers), ("num_experts", grid.experts_key, grid.num_experts))
    for (name, key, wants), has in zip(keys, loads.tokens.shape[::2], strict=True):
        if has != wants:
            raise ConfigError(f"{path}: its run had {name} = {has}, {key} = {wants}")
    if not (np.isfinite(loads.tokens) & (loads.tokens >= 0)).all() or (loads.tokens.sum(axis=(1, 2)) == 0).any():
        raise ConfigError(f"{path}: holds a layer without tokens")
    return loads
