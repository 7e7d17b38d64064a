"""What an earlier run's record tells of its loads: the tokens that asked for each expert, by their home where kept."""

import h5py
import numpy as np

from hpcmoe.errors import CheckpointError
from hpcmoe.placement.demand import Loads
from hpcmoe.write.hdf5 import raise_as_checkpoint_error, read_value

BY_NODE, BY_STEP, NODE_NAMES = "experts/tokens_of_node", "experts/utilisation/value", "cluster/node_names"
LAST_STEPS = 10  # of a record that tells no nodes


def read_loads(path):
    """Read a run.h5 -> Loads: by node where it was recorded so, else of the last steps and all nodes together.

    Raises CheckpointError in one line where the file cannot be read or holds neither.
    """
    with raise_as_checkpoint_error(path, "read"), h5py.File(path) as file:
        if isinstance(file.get(BY_NODE), h5py.Dataset) and file[BY_NODE].ndim == 3:
            names = tuple(np.atleast_1d(read_value(file[NODE_NAMES])))
            return Loads(tokens=file[BY_NODE][:], node_names=names)
        if isinstance(file.get(BY_STEP), h5py.Dataset) and file[BY_STEP].ndim == 3 and len(file[BY_STEP]) > 0:
            return Loads(tokens=file[BY_STEP][-LAST_STEPS:].mean(axis=0)[:, None], node_names=())
    raise CheckpointError(f"{path}: holds no tokens of experts; must be the run.h5 of a run that took a step")
