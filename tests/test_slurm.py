"""The main job on clusters: four nodes of a real Slurm, and four hosts with shaped links between them."""

import sys

import numpy as np
import pytest
from lab.machines import LAB, racks, slurm
from launch import MPIRUN, run

from hpcmoe.cluster.topology import load_topology

SHORT = ["--set", "run.steps=2", "--set", "data.batch_sequences=16", "--set", "data.validation_sequences=16"]
INSIDE_RACK, BETWEEN_RACKS = 2e9 / 8, 200e6 / 8  # bytes a second, as racks.sh shapes them


@pytest.fixture(scope="module")
def slurm_conf():
    with slurm() as path:
        yield path


@pytest.fixture
def hosts():
    with racks() as names:
        yield names


@pytest.mark.slurm
@pytest.mark.parametrize(("launch", "ranks"), [("srun", 16), ("mpirun", 8)])
def test_sbatch_runs_the_job_on_four_nodes_in_two_racks(slurm_conf, launch, ranks, tmp_path):
    log = tmp_path / "log"
    job = ["jobs/ep16.slurm", *SHORT, "--set", f"run.output={tmp_path}"]
    sbatch = ["sbatch", "--wait", f"--ntasks-per-node={ranks // 4}", f"--output={log}"]
    ended = run(*sbatch, *job, timeout_seconds=300, SLURM_CONF=slurm_conf, LAUNCH=launch)

    assert ended.status == 0, f"{ended}\n{log.read_text() if log.exists() else 'no output'}"
    assert f"{ranks} ranks on 4 nodes in 2 racks" in log.read_text(), log.read_text()
    topology = load_topology(tmp_path / "run" / "topology.json")
    assert topology.node_names == ("node0", "node1", "node2", "node3")
    assert topology.rack_of_node.tolist() == [0, 0, 1, 1]
    assert np.bincount(topology.node_of_rank).tolist() == [ranks // 4] * 4


@pytest.mark.racks
def test_links_are_measured_as_they_are_shaped(hosts, tmp_path):
    # Other work on this machine can only slow a link: the fastest of a few measurements is the link's own.
    fastest, links = np.zeros((4, 4)), ~np.eye(4, dtype=bool)
    for _ in range(3):
        topology = measure_over_racks(hosts, tmp_path)
        same_rack = np.equal.outer(topology.rack_of_node, topology.rack_of_node)
        shaped = np.where(same_rack, INSIDE_RACK, BETWEEN_RACKS)
        fastest = np.maximum(fastest, topology.bytes_per_second)
        if np.allclose(fastest[links], shaped[links], rtol=0.2):
            break
    assert topology.node_names == tuple(hosts)
    np.testing.assert_allclose(fastest[links], shaped[links], rtol=0.2)


def measure_over_racks(hosts, folder):
    """Run the main job, a rank on each host -> the Topology that it found and wrote."""
    over_the_links = ["-launcher", "rsh", "-launcher-exec", LAB / "agent", "-hosts", ",".join(hosts), "-n", 4]
    places = ["--set", f"run.output={folder}", "--set", 'cluster.rack_of_node=["left", "left", "right", "right"]']
    main = [sys.executable, "-m", "hpcmoe.main", "inputs/run.toml", *SHORT, *places]
    ended = run(LAB / "on", hosts[0], MPIRUN, *over_the_links, *main, timeout_seconds=120, UCX_TLS="tcp,self")
    assert ended.status == 0, ended
    return load_topology(folder / "run" / "topology.json")
