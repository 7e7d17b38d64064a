"""The state of a model in training as logical arrays: parameters and buffers, and the moments of what is trained."""

from torch import Tensor, nn

from hpcmoe.cluster.mesh import Mesh
from hpcmoe.run.model_optimizer import ModelOptimizer
from hpcmoe.run.model_state import Held, ModelState
from hpcmoe.run.optimizer_state import States
from hpcmoe.run.slices import ArraySlice, cut_slice


class TunedState:
    """Names what this rank holds of a model and its optimizer, by the present placement of the experts."""

    def __init__(self, mesh: Mesh, model: nn.Module, optimizer: ModelOptimizer | None) -> None:
        """Collective over mesh.world. optimizer: None in inference."""
        self.optimizer, self.state = optimizer, ModelState(mesh, model, None)

    def list_held(self) -> Held:
        """List every slice that this rank holds, with its tensor."""
        return self.state.list_held(self.list_whole_moments()) + self.list_moments_of_rows()

    def list_owned(self) -> Held:
        """List what this rank saves: with the other ranks, each number once."""
        return self.state.list_owned(self.list_whole_moments()) + self.list_moments_of_rows()

    def list_whole_moments(self) -> States:
        """List the moments of parameters that this rank steps whole."""
        if self.optimizer is None:
            return {}
        stepped = [parameter for group in self.optimizer.adamw.param_groups for parameter in group["params"]]
        return {p: self.optimizer.moments_of(p) for p in stepped if p in self.state.slices}

    def list_moments_of_rows(self) -> list[tuple[ArraySlice, Tensor]]:
        """List the moments of rows of dense parameters, whose other rows other ranks step."""
        found, optimizer = list[tuple[ArraySlice, Tensor]](), self.optimizer
        if optimizer is None:
            return found
        rows_of = [(p, own) for p, rows in optimizer.stepped_rows.items() for own in rows if own.rows is not p]
        for parameter, own in rows_of:
            for name, moment in optimizer.moments_of(own.rows).items():
                whole = self.state.slice_of_entry(self.state.slices[parameter], name, parameter, parameter)
                found.append((cut_slice(whole, own.first, len(own.rows)), moment))
        return found
