"""The world split into data-, expert- and tensor-parallel groups."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from hpcmoe.cluster.mesh import mesh_coordinates, mesh_shape, open_mesh
from hpcmoe.config import ParallelConfig
from hpcmoe.errors import ClusterError
from hpcmoe.wait import gather_to_all


@pytest.mark.parametrize(
    ("ranks", "asked", "shape"),
    [
        (16, (1, 0, 1), (1, 16, 1)),
        (16, (2, 0, 4), (2, 2, 4)),
        (16, (4, 2, 2), (4, 2, 2)),
        (1, (1, 0, 1), (1, 1, 1)),
        (3, (3, 0, 1), (3, 1, 1)),
    ],
)
def test_expert_parallel_zero_takes_what_is_left(ranks, asked, shape):
    assert mesh_shape(ranks, *asked) == shape


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((1, 12, 2), "[parallel] expert = 12 must divide the 16 ranks / tensor 2 = 8"),
        ((3, 0, 2), "[parallel] data = 3 must divide the 16 ranks / tensor 2 = 8"),
        ((1, 0, 3), "[parallel] tensor = 3 must divide the 16 ranks"),
        ((1, 4, 2), "[parallel] data 1 x expert 4 x tensor 2 = 8 must equal the 16 ranks"),
        ((8, 8, 1), "[parallel] data 8 x expert 8 x tensor 1 = 64 must equal the 16 ranks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_arithmetic(asked, message):
    with pytest.raises(ClusterError) as rejected:
        mesh_shape(16, *asked)
    assert str(rejected.value) == message


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_coordinates_number_all_ranks_with_tensor_innermost(dp, ep, tp):
    for rank in range(dp * ep * tp):
        data, expert, tensor = mesh_coordinates(rank, ep, tp)
        assert (data * ep + expert) * tp + tensor == rank
        assert data < dp and expert < ep and tensor < tp


def shapes_of(ranks):
    """List all (data, expert, tensor) whose product is the ranks."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    return [(dp, ranks // dp // tp, tp) for dp in sizes for tp in sizes if ranks % (dp * tp) == 0]


@pytest.mark.mpi
def test_each_group_holds_the_ranks_that_differ_in_its_coordinate_alone(comm):
    for dp, ep, tp in shapes_of(comm.size):
        with open_mesh(comm, ParallelConfig(data=dp, expert=ep, tensor=tp)) as mesh:
            assert (mesh.data_parallel, mesh.expert_parallel, mesh.tensor_parallel) == (dp, ep, tp)
            data, expert, tensor = mesh.data_index, mesh.expert_index, mesh.tensor_index
            assert (mesh.dp.rank, mesh.ep.rank, mesh.world.rank) == (data, expert, comm.rank)
            assert (mesh.token_index, mesh.num_token_shares) == (comm.rank, comm.size)
            assert gather_to_all(mesh.group, comm.rank) == list(range(data * ep * tp, (data + 1) * ep * tp))
            assert gather_to_all(mesh.ep, comm.rank) == [(data * ep + e) * tp + tensor for e in range(ep)]
            assert gather_to_all(mesh.dp, comm.rank) == [(d * ep + expert) * tp + tensor for d in range(dp)]


@pytest.mark.mpi
def test_all_ranks_share_the_refusal(comm):
    asked = ParallelConfig(tensor=comm.size + 1)
    with pytest.raises(ClusterError, match=f"must divide the {comm.size} ranks") as rejected, open_mesh(comm, asked):
        pass
    assert rejected.value.shared


@pytest.mark.mpi
@pytest.mark.parametrize("times", [3, pytest.param(600, marks=pytest.mark.full)])
def test_meshes_are_freed(comm, times):
    # MPICH has room for 2048 communicators at once.
    for _ in range(times):
        with open_mesh(comm, ParallelConfig()) as mesh:
            pass
        assert all(group == MPI.COMM_NULL for group in (mesh.world, mesh.group, mesh.ep, mesh.dp))
