"""What the machine under a rank tells."""

import psutil

from hpcmoe.cluster import machine


def write_limit(mount, path, limit):
    """Write a control group's limit file."""
    file = mount / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{limit}\n")


def limits(tmp_path, listing):
    """Read the limits under tmp_path for a process whose /proc/self/cgroup says `listing`."""
    (tmp_path / "listing").write_text(listing)
    return machine.read_cgroup_limits(tmp_path, tmp_path / "listing")


def test_limits_of_version_two_are_those_of_all_levels_above(tmp_path):
    write_limit(tmp_path, "slurm/memory.max", 4000)
    write_limit(tmp_path, "slurm/job/memory.max", 3000)
    write_limit(tmp_path, "slurm/job/step/memory.max", "max")
    write_limit(tmp_path, "slurm/other/memory.max", 10)
    assert limits(tmp_path, "0::/slurm/job/step\n") == [4000, 3000]


def test_limits_of_version_one_are_the_memory_controller_s(tmp_path):
    write_limit(tmp_path, "memory/memory.limit_in_bytes", 2**63 - 4096)
    write_limit(tmp_path, "memory/job/memory.limit_in_bytes", 5000)
    write_limit(tmp_path, "cpu/job/memory.limit_in_bytes", 10)
    assert limits(tmp_path, "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n") == [2**63 - 4096, 5000]


def test_in_a_container_the_top_is_mounted_alone(tmp_path):
    write_limit(tmp_path, "memory.max", 6000)
    assert limits(tmp_path, "0::/docker/of-the-host/4f2a\n") == [6000]


def test_without_control_groups_the_machine_s_memory_counts(tmp_path, monkeypatch):
    assert machine.read_cgroup_limits(tmp_path, tmp_path / "none") == []
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "none")
    assert machine.read_memory_bytes() == psutil.virtual_memory().total


def test_a_limit_below_the_machine_s_memory_counts(tmp_path, monkeypatch):
    write_limit(tmp_path, "memory.max", 6000)
    (tmp_path / "listing").write_text("0::/\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "listing")
    assert machine.read_memory_bytes() == 6000


def test_cuda_devices_are_counted_where_the_driver_shows_them(tmp_path, monkeypatch):
    gpus, dev = tmp_path / "gpus", tmp_path / "dev"
    monkeypatch.setattr(machine, "DEVICE_FOLDERS", ((gpus, r".+"), (dev, r"nvidia\d+")))
    assert machine.count_cuda_devices() == 0
    dev.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (dev / name).touch()
    assert machine.count_cuda_devices() == 2
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (gpus / name).mkdir(parents=True)
    assert machine.count_cuda_devices() == 3


SCONTROL = """#!/bin/sh
case "$2 $3" in
  "topology ") echo "SwitchName=rackA Level=0 LinkSpeed=1 Nodes=n[0-1]"
               echo "SwitchName=rackB Level=0 LinkSpeed=1 Nodes=n2"
               echo "SwitchName=top Level=1 LinkSpeed=1 Nodes=n[0-2] Switches=rack[A-B]" ;;
  "hostnames n[0-1]") echo n0; echo n1 ;;
  "hostnames n2") echo n2 ;;
  *) exit 1 ;;
esac
"""


def test_scontrol_s_lowest_switches_are_the_racks(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    assert machine.ask_scontrol() == {"n0": "rackA", "n1": "rackA", "n2": "rackB"}


def test_without_scontrol_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.ask_scontrol() == {}
