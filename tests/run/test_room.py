"""A first look at memory refuses what cannot fit anywhere, and nothing else."""

import dataclasses

import numpy as np
import pytest
from small import make_config, make_topology

from hpcmoe.errors import PlacementError
from hpcmoe.run.room import check_room


@pytest.mark.parametrize(
    ("mode", "dtype", "num_bytes"), [("train", "bfloat16", 16), ("infer", "bfloat16", 2), ("infer", "float32", 4)]
)
def test_room_is_that_of_all_nodes_for_all_experts_and_their_state(mode, dtype, num_bytes):
    config = make_config(run__mode=mode, model__dtype=dtype)
    needed = 4 * 2 * (2 * 8 * 12) * num_bytes  # experts x layers x numbers x bytes of a number and its state
    topology = make_topology(4, 2)
    check_room(config, dataclasses.replace(topology, memory_bytes=np.array([needed // 2, needed // 2])))
    with pytest.raises(PlacementError, match=r"4 experts x 2 layers .* do not fit .* of 4 ranks on 2 nodes"):
        check_room(config, dataclasses.replace(topology, memory_bytes=np.array([needed // 2, needed // 2 - 1])))
