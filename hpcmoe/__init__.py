"""hpcmoe: mixture-of-experts models whose experts are distributed over MPI ranks.

The chapters in the order in which they may import each other, which is the order of the story:

    output ... environment   ground: output and signals, MPI's start, waiting, clock, errors of all ranks or of one
    messages ... config      run.toml: read, checked, expanded
    gemm                     products of matrices
    cluster/                 where we run: topology, its links as measured or given, the mesh of ranks
    comm/                    what carries bytes: devices, transports, all-to-all, the window of a node, reductions
    dispatch/                a token leaves and returns: router, plan, dispatchers
    experts/                 what happens there: feed-forward networks, the layer as one differentiable call
    model/                   what is trained: the language model, its text and balance; hf/: Hugging Face families
    pipeline/                many tokens at once: micro-batches in lanes that take turns
    placement/               where experts live: from a problem of tokens, links and memory to experts on ranks
    prepare/                 what fits: sizes, memory, budget, the placement of a run
    projection/              what is foretold: a cluster, a model, costs and loads as described, before there are ranks
    report/                  what is shown: metrics, progress, tables, figures; page/: the report of a run
    run/                     many steps: job, training, inference, optimizer, migration of experts
    write/                   what is kept: records, checkpoints, activations, the run's folder
    checkpointing ... hf     the library: any torch model saved and loaded; the group that hpcmoe.open() gives
    main, place, plan ...   the programs; __main__, the `hpcmoe` command, lists and runs them

The path of a token:

    model.text            bytes of text become a micro-batch, this rank's share of it
    model.language        embedding; in each block attention, then a norm
    dispatch.router       logits = W_g x, softmax, the top K experts and their gate values
    dispatch.plan         each assignment goes to a replica of its expert; rows are sorted by destination
    dispatch.host         dispatch: rows are written or sent to their experts' ranks, without blocking
    experts.feed_forward  experts compute on the rows of the peers that have arrived
    dispatch.host         combine: results return, weighted by their gate values
    experts.layer         the sum of a token's K results is added to the residual
    run.optimizer         backward, gradients take the same path; they are summed, clipped, applied

Glossary:

    assignment         one of a token's K choices of an expert; what dispatch moves
    replica, slot      a copy of an expert's weights; the place on a rank that holds one, in every layer
    share              the part of an expert's tokens that a replica serves
    placement          which expert each slot holds; a migration changes it in a run
    home               the rank whose tokens they are, to which results return
    plan               a micro-batch's assignments, sorted by destination
    dispatch, combine  rows to their experts; results home. The handle of a dispatch is what its combine needs
    window             memory that the ranks of a node, local peers of each other, read and write without messages
    descriptor         an entry of the window that announces rows
    message            rows for another node, which one of its ranks, the receiver, puts into its receive pool
    backend, request   what carries rows; a transfer that has started, with recv_done and send_done
    poke               let MPI and background tasks progress, without waiting
    lane, turn         some micro-batches of a step in a thread of their own; one lane at a time has the turn
    stage              route, dispatch, compute, combine or dense: what a lane waits for, and seconds are counted by
    piece, snapshot    a box of a logical array on one rank; a copy of all pieces, from which a thread writes

Letters in shapes: T tokens of this rank's micro-batch, K experts of a token, N = T * K assignments, N' assignments sent
(not dropped), R rows received, H hidden size, F feed-forward size, E logical experts, P ranks of the expert-parallel
group, s slots of a rank, S = P * s slots of the group, L layers, M micro-batches.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcmoe import hf as hf
    from hpcmoe.cluster.discover import measure as measure
    from hpcmoe.cluster.topology import Topology as Topology
    from hpcmoe.errors import CheckpointError as CheckpointError
    from hpcmoe.errors import ClusterError as ClusterError
    from hpcmoe.errors import ConfigError as ConfigError
    from hpcmoe.errors import HpcmoeError as HpcmoeError
    from hpcmoe.errors import PeerError as PeerError
    from hpcmoe.errors import PlacementError as PlacementError
    from hpcmoe.errors import TrainingError as TrainingError
    from hpcmoe.experts.moe import Experts as Experts
    from hpcmoe.experts.moe import MoE as MoE
    from hpcmoe.experts.own import Dispatcher as Dispatcher
    from hpcmoe.group import Group as Group
    from hpcmoe.group import open as open
    from hpcmoe.placement.eplb import rebalance as rebalance
    from hpcmoe.placement.place import place as place
    from hpcmoe.placement.problem import PlacementProblem as PlacementProblem
    from hpcmoe.placement.result import Placement as Placement

__version__ = "0.6.0"

_MODULE_OF_NAME = {  # the public names, imported when they are first used: `import hpcmoe` alone takes no time
    "CheckpointError": "hpcmoe.errors",
    "ClusterError": "hpcmoe.errors",
    "ConfigError": "hpcmoe.errors",
    "Dispatcher": "hpcmoe.experts.own",
    "Experts": "hpcmoe.experts.moe",
    "Group": "hpcmoe.group",
    "HpcmoeError": "hpcmoe.errors",
    "MoE": "hpcmoe.experts.moe",
    "PeerError": "hpcmoe.errors",
    "Placement": "hpcmoe.placement.result",
    "PlacementError": "hpcmoe.errors",
    "PlacementProblem": "hpcmoe.placement.problem",
    "Topology": "hpcmoe.cluster.topology",
    "TrainingError": "hpcmoe.errors",
    "measure": "hpcmoe.cluster.discover",
    "open": "hpcmoe.group",
    "place": "hpcmoe.placement.place",
    "rebalance": "hpcmoe.placement.eplb",
}
_PUBLIC_MODULES = {"hf": "hpcmoe.hf"}  # imported alike
__all__ = [*_MODULE_OF_NAME, *_PUBLIC_MODULES]


class _Package(ModuleType):
    """The package: a program's module, such as that of `python -m hpcmoe.place`, never hides a public name."""

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, but not a public name to a module, as the import of hpcmoe.place would."""
        if not (name in _MODULE_OF_NAME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _PUBLIC_MODULES:
        value: Any = importlib.import_module(_PUBLIC_MODULES[name])
    else:
        value = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names beside those that are there already."""
    return sorted({*globals(), *__all__})
