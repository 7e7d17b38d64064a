"""A model and its optimizer to a folder and back, at any shape of the ranks into any other."""

import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.errors import CheckpointError, on_all, on_root
from hpcmoe.messages import one_line
from hpcmoe.paths import expand_path
from hpcmoe.replacing import OLD, choose_target
from hpcmoe.run.model_state import ArrayInfo, Held, ModelState, is_expert
from hpcmoe.run.optimizer_state import (
    StateKind,
    find_dtype,
    list_hyperparameters,
    name_dtype,
    restore_entries,
    restore_hyperparameters,
)
from hpcmoe.run.slices import ArraySlice
from hpcmoe.wait import barrier, gather_to_all
from hpcmoe.write.boxes import PieceSpec
from hpcmoe.write.checkpoint import read_metadata, verify_pieces
from hpcmoe.write.checksums import CHECKSUMS
from hpcmoe.write.hdf5 import Values, checkpoint_errors
from hpcmoe.write.pieces import MASTER, read_each, write_pieces

log = logging.getLogger(__name__)
_FORMAT = 1  # of what the metadata say of a model
_OWN_FILES = re.compile(rf"{re.escape(MASTER)}|{CHECKSUMS}|rank\d+\.h5")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPiece:
    """A piece of a logical array whose data come to the host as they are written."""

    part: ArraySlice
    tensor: Tensor

    @property
    def spec(self) -> PieceSpec:
        """Return the piece's box and dtype, without its data."""
        return make_spec(self.part, torch.empty(0, dtype=find_host_dtype(self.tensor.dtype)).numpy().dtype.name)

    @property
    def array(self) -> np.ndarray:
        """Return the data."""
        tensor = self.tensor.detach().reshape(self.part.extent)
        return tensor.to("cpu", find_host_dtype(tensor.dtype)).numpy()


def save_model(
    mesh: Mesh, folder: Path | str, model: nn.Module, optimizer: TorchOptimizer | None, extra: dict[str, Any] | None
) -> None:
    """Write a model, its optimizer and `extra` to a folder, which appears whole, or not at all. Collective over world.

    Every number is written once, by one rank, and comes to the host just then. Parameters outside of experts are alike
    on all ranks; of buffers rank 0's are saved. extra: what JSON holds, as rank 0 has it; JSON makes tuples lists and
    keys strings. A checkpoint of the same name is replaced, any other folder is not. Raises CheckpointError on all
    ranks.
    """
    started, world = time.monotonic(), mesh.world
    path = on_root(world, lambda: choose_target(folder, "save", _OWN_FILES, (MASTER,)))
    written = on_root(world, lambda: encode("extra", extra or {}))
    state = ModelState(mesh, model, optimizer)
    described = state.describe()
    metadata = {
        "model_format": _FORMAT,
        "arrays": json.dumps({name: dataclasses.asdict(info) for name, info in described.items()}),
        "optimizer": on_root(world, lambda: encode("param_groups", describe_optimizer(optimizer))),
        "extra": written,
        "num_ranks": world.size,
    }
    held = on_all(world, lambda: state.list_owned(state.list_states(described, fill=True)))
    write_pieces(world, path, [TensorPiece(part=part, tensor=tensor) for part, tensor in held], metadata)
    log.info("%s: %d arrays written in %.2f s", path, len(described), time.monotonic() - started)


def load_model(mesh: Mesh, folder: Path | str, model: nn.Module, optimizer: TorchOptimizer | None) -> dict[str, Any]:
    """Read what save_model wrote, at any number of ranks, into a model and optimizer -> extra. Collective over world.

    Each rank reads what it holds. The optimizer may be new; without one, parameters and buffers alone are read. All
    files are verified, and all arrays found with their shapes, before anything changes: the model's are those of the
    checkpoint. Floating-point arrays are cast to the model's dtypes, which is logged. Raises CheckpointError on all
    ranks.
    """
    started, world = time.monotonic(), mesh.world
    path = on_root(world, lambda: choose_source(folder))
    verify_pieces(world, path)
    metadata = on_root(world, lambda: read_model_metadata(path))
    described, saved, extra = on_all(world, lambda: decode_metadata(metadata, path))
    state = ModelState(mesh, model, optimizer)
    check_names(state, path, described)
    on_all(world, lambda: in_file(path, lambda: check_optimizer(state, described, saved)))

    # Read every array that this rank holds; then the optimizer takes what was read for it.
    states = state.list_states(described, fill=False)
    held = on_all(world, lambda: in_file(path, lambda: state.list_held(states)))
    on_all(world, lambda: in_file(path, lambda: check_dtypes(held, described)))
    read_tensors(mesh, path, held)
    if optimizer is not None and saved is not None:
        for parameter, entries in states.items():
            part, info = state.slices[parameter], described[state.slices[parameter].name]
            expert = part.start[0] if is_expert(part) else None
            kept = {entry: own for entry, own in entries.items() if expert not in info.absent.get(entry, [])}
            restore_entries(optimizer, parameter, info.state, kept)
        restore_hyperparameters(optimizer, saved["groups"])
    state.refresh()
    log_casts(mesh, path, find_casts(held, described))
    log.info("%s: read in %.2f s, written by %d ranks", path, time.monotonic() - started, metadata.get("num_ranks"))
    return extra


def read_tensors(mesh: Mesh, path: Path, held: Held) -> None:
    """Read the arrays of a checkpoint into the tensors of this rank, one after the other. Collective over world."""
    tensors: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}
    for part, tensor in held:
        tensors.setdefault((part.name, part.start), []).append(tensor)  # several where replicas are on one rank

    @torch.no_grad()
    def take(spec: PieceSpec, array: np.ndarray) -> None:
        """Copy one array to where it is held."""
        for tensor in tensors[spec.name, spec.start]:
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)).view(tensor.shape))

    read_each(mesh.world, path, [*{make_spec(part): None for part, _ in held}], take)


def make_spec(part: ArraySlice, dtype: str = "") -> PieceSpec:
    """Return the box of a slice."""
    return PieceSpec(
        name=part.name, shape=part.shape, start=part.start, extent=part.extent, dtype=dtype, keys=part.keys
    )


def find_host_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which NumPy holds numbers exactly: float32 for bfloat16 and the floats of eight bits."""
    known = dtype in (torch.float16, torch.float32, torch.float64) or not dtype.is_floating_point
    return dtype if known else torch.float32


def choose_source(folder: Path | str) -> Path:
    """Choose the path to read -> absolute. Raises CheckpointError where there is no folder."""
    path = Path(expand_path(str(folder), "load")).resolve()
    with checkpoint_errors(path, "read"):
        if not path.is_dir():
            old = path.with_name(f"{path.name}{OLD}")
            before = f"; one that was being replaced is {old}: rename it" if old.is_dir() else ""
            raise CheckpointError(f"{path}: no such folder, so no checkpoint to load{before}")
    return path


def read_model_metadata(path: Path) -> Values:
    """Read a checkpoint's metadata. Raises CheckpointError where it is none of a model."""
    metadata = read_metadata(path)
    if metadata.get("model_format") != _FORMAT:
        raise CheckpointError(f"{path}: was not written by save() of this version of hpcmoe")
    return metadata


def decode_metadata(metadata: Values, path: Path) -> tuple[dict[str, ArrayInfo], dict[str, Any] | None, dict[str, Any]]:
    """Decode what the metadata say -> (arrays by name, the optimizer, extra). Raises CheckpointError."""
    most_bytes = sum(entry.stat().st_size for entry in path.iterdir())
    try:
        described = {name: make_info(info) for name, info in json.loads(metadata["arrays"]).items()}
        for info in described.values():
            check_info(info, most_bytes)
        saved = json.loads(metadata["optimizer"])
        if saved is not None and not (
            isinstance(saved["name"], str) and all(isinstance(g, dict) for g in saved["groups"])
        ):
            raise ValueError("the optimizer has no groups of values")
        return described, saved, json.loads(metadata["extra"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / MASTER}: metadata are damaged: {one_line(error)}") from error


def check_info(info: ArrayInfo, most_bytes: int) -> None:
    """Check what is said of an array before anything is allocated for it. Raises ValueError or TypeError."""
    for kind in info.state.values():
        shape = [] if kind.shape is None else kind.shape
        if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) > most_bytes:
            raise ValueError(f"state of shape {shape}: the files hold {most_bytes} bytes")
    for name in (info.dtype, *(kind.dtype for kind in info.state.values())):
        if not isinstance(find_dtype(name), torch.dtype):
            raise ValueError(f"{name!r} is no dtype")


def encode(what: str, value: Any) -> str:
    """Encode as JSON. Raises CheckpointError for what it does not hold."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what}: cannot be saved as JSON: {error}") from error


def describe_optimizer(optimizer: TorchOptimizer | None) -> dict[str, Any] | None:
    """Describe an optimizer as a whole: its class and its groups' hyper-parameters."""
    if optimizer is None:
        return None
    return {"name": type(optimizer).__name__, "groups": list_hyperparameters(optimizer)}


def make_info(info: dict[str, Any]) -> ArrayInfo:
    """Return an ArrayInfo from what JSON made of it."""
    return ArrayInfo(**info | {"state": {entry: StateKind(**kind) for entry, kind in info["state"].items()}})


def in_file(path: Path, check: Callable[[], _Result]) -> _Result:
    """Return what a check of a checkpoint returns, or name the checkpoint in its error."""
    try:
        return check()
    except CheckpointError as error:
        raise CheckpointError(f"{path / MASTER}: {error}") from error


def check_names(state: ModelState, path: Path, described: dict[str, ArrayInfo]) -> None:
    """Check that a checkpoint has no array that the model lacks; read_each finds what the checkpoint lacks.

    Collective over world: a rank may hold no expert of a layer.
    """

    def check() -> None:
        """Check on rank 0."""
        if others := sorted(described.keys() - set().union(*gathered or [])):
            raise CheckpointError(f"{path / MASTER}: checkpoint has {others[0]}, which this model has not")

    barrier(state.mesh.world)
    gathered = state.mesh.world.gather({part.name for part in state.slices.values()} | state.buffers.keys())
    on_root(state.mesh.world, check)


def check_optimizer(state: ModelState, described: dict[str, ArrayInfo], saved: dict[str, Any] | None) -> None:
    """Check that the optimizer is of the class, and has the groups, of the one that was saved."""
    if state.optimizer is None:
        return
    name, num_groups = type(state.optimizer).__name__, len(state.optimizer.param_groups)
    if saved is None:
        raise CheckpointError(f"checkpoint was saved without an optimizer, this is {name}")
    if (saved["name"], len(saved["groups"])) != (name, num_groups):
        has = f"{saved['name']} of {len(saved['groups'])} param_groups"
        raise CheckpointError(f"checkpoint has the optimizer {has}, this is {name} of {num_groups}")
    for parameter, group in state.group_of_parameter.items():
        array = state.slices[parameter].name
        was = described[array].group if array in described else None
        if was is not None and was != group:
            raise CheckpointError(f"checkpoint has {array} in param_groups[{was}], this optimizer in [{group}]")


def check_dtypes(held: Held, described: dict[str, ArrayInfo]) -> None:
    """Check that arrays are floating-point where the model's are, else of the same dtype."""
    for name, (was, dtype) in find_casts(held, described).items():
        if not (find_dtype(was).is_floating_point and find_dtype(dtype).is_floating_point):
            raise CheckpointError(f"checkpoint has {name} as {was}, this model wants {dtype}")


def find_casts(held: Held, described: dict[str, ArrayInfo]) -> dict[str, tuple[str, str]]:
    """Find the parameters and buffers of another dtype than the checkpoint's -> {name: (its dtype, the model's)}."""
    casts = {}
    for part, tensor in held:
        name, _, entry = part.name.rpartition("/")
        if entry == "value" and name in described and described[name].dtype != name_dtype(tensor):
            casts[name] = described[name].dtype, name_dtype(tensor)
    return casts


def log_casts(mesh: Mesh, path: Path, casts: dict[str, tuple[str, str]]) -> None:
    """Log once which dtypes were cast to which, with an example. Collective over world."""
    own = {cast: name for name, cast in casts.items()}
    examples = {cast: name for of_rank in gather_to_all(mesh.world, own) for cast, name in of_rank.items()}
    for (was, dtype), name in examples.items():
        log.info("%s: arrays of %s are cast to this model's %s, such as %s", path, was, dtype, name)
