"""What version 0.2.0 wrote still serves: its checkpoint, its record, its links; its run.toml is told the new keys."""

import json

import h5py
import pytest
from launch import ROOT, mpirun

from hpcmoe.cluster.given import read_links
from hpcmoe.config import read_config
from hpcmoe.errors import ConfigError
from hpcmoe.placement.demand import find_loads
from hpcmoe.write.loads import read_loads
from hpcmoe.write.problem import read_run_problem

OLD = ROOT / "tests" / "old"
NEW = {  # the keys of OLD / "run.toml" that have another place now
    "links": 'links = "{links}"',
    "search_seconds": "[placement]\nsearch_seconds = 0.2",
    "bytes_per_second": "",
    "latency_seconds": "",
}


@pytest.fixture
def config(tmp_path):
    """OLD / "run.toml" with its keys where they are now -> the file."""
    (tmp_path / "links.json").write_text('{"bytes_per_second": [[1e9]], "latency_seconds": [[1e-6]]}')
    lines = (OLD / "run.toml").read_text().splitlines()
    lines = [NEW.get(line.partition(" ")[0], line).format(links=tmp_path / "links.json") for line in lines]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    return tmp_path / "run.toml"


def read_losses(path):
    """Read the losses of a record's steps -> list."""
    with h5py.File(path) as file:
        return file["train/loss/value"][:].tolist()


def test_an_old_run_toml_is_told_where_each_key_is_now():
    with pytest.raises(ConfigError) as refused:
        read_config(OLD / "run.toml")
    lines = [line.removeprefix(f"{OLD / 'run.toml'}: [cluster] ") for line in str(refused.value).splitlines()]
    told = dict(line.split(" = ", 1) for line in lines)
    assert set(told) == {
        "bytes_per_second", "latency_seconds", "search_seconds", "search_iterations", "seconds_per_token", "replicate",
        "spare_slots_per_rank",
    }  # fmt: skip
    assert told["replicate"] == "True: is now [placement] replicate"


def test_an_old_record_gives_its_loads_and_its_problem(config):
    model = read_config(config)[0].model
    loads = find_loads(str(OLD / "run.h5"), model, read_loads)
    assert loads.tokens.shape[::2] == (2, 4) and loads.tokens.sum() > 0
    problem, _ = read_run_problem(OLD / "run.h5")
    assert (problem.num_experts, problem.replicate, problem.seconds_per_token) == (4, True, 1e-7)


def test_an_old_topology_gives_its_links():
    nodes = json.loads((OLD / "topology.json").read_text())["nodes"]
    links, _ = read_links(OLD / "topology.json", tuple(nodes), tuple({node["rack"] for node in nodes.values()}))
    assert links.bytes_per_second.tolist() == [[1e9]] and links.latency_seconds.tolist() == [[1e-6]]


def test_a_run_goes_on_from_an_old_checkpoint(config, tmp_path):
    """Its losses are those of the run that went on then, bit for bit."""
    ended = mpirun(2, "-m", "hpcmoe.main", config, "--set", f"run.output={tmp_path}", "--resume", OLD / "checkpoint-2")
    assert ended.status == 0 and "resumed " in ended.errors, ended
    assert "with other settings" not in ended.errors and "not those that would" not in ended.errors, ended
    assert read_losses(tmp_path / "old" / "run.h5") == read_losses(OLD / "run.h5")[2:]
