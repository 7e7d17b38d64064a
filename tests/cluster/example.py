"""One topology for the tests of its file."""

import numpy as np

from hpcmoe.cluster.topology import Topology


def example():
    """Make a topology of three nodes in two racks, every entry another number."""
    return Topology(
        node_of_rank=np.array([0, 1, 0, 2, 1, 0]),
        node_names=("n0", "n1", "n2"),
        rack_of_node=np.array([0, 1, 0]),
        rack_names=("left", "right"),
        bytes_per_second=np.arange(1.0, 10.0).reshape(3, 3) / 7,
        latency_seconds=np.arange(11.0, 20.0).reshape(3, 3) * 1e-6,
        egress_bytes_per_second=np.array([2.5, 3.5, 4.5]),
        ingress_bytes_per_second=np.array([5.5, 6.5, 7.5]),
        uplink_bytes_per_second=np.array([1.25, np.inf]),
        memory_bytes=np.array([10**9, 2 * 10**9, 3 * 10**9]),
        devices_of_node=np.array([0, 4, 8]),
        cores_of_node=np.array([2, 4, 6]),
        source={"links": "measured"},
    )
