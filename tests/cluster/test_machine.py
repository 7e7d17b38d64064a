"""What the machine under a rank tells."""

import psutil
import pytest

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


def quotas(tmp_path, listing):
    """Read the quotas under tmp_path for a process whose /proc/self/cgroup says `listing` -> CPUs."""
    (tmp_path / "listing").write_text(listing)
    read = machine.read_cpu_quotas(tmp_path, tmp_path / "listing")
    assert len({group for group, _ in read}) == len(read)
    return [cpus for _, cpus in read]


def test_quotas_of_version_two_are_those_of_all_levels_above(tmp_path):
    write_limit(tmp_path, "slurm/cpu.max", "400000 100000")
    write_limit(tmp_path, "slurm/job/cpu.max", "max 100000")
    write_limit(tmp_path, "slurm/job/step/cpu.max", "50000 100000")
    write_limit(tmp_path, "slurm/other/cpu.max", "1000 100000")
    assert quotas(tmp_path, "0::/slurm/job/step\n") == [4.0, 0.5]


def test_quotas_of_version_one_are_the_cpu_controller_s(tmp_path):
    for folder, quota in (("", -1), ("job", 150_000), ("job/step", 250_000)):
        for name in ("cpu", "cpuset"):
            write_limit(tmp_path, f"{name}/{folder}/cpu.cfs_quota_us", quota)
            write_limit(tmp_path, f"{name}/{folder}/cpu.cfs_period_us", 100_000)
    assert quotas(tmp_path, "5:cpuset:/\n4:cpu:/job/step\n0::/\n") == [1.5, 2.5]
    (tmp_path / "cpu").rename(tmp_path / "cpu,cpuacct")  # as some systems mount it
    assert quotas(tmp_path, "4:cpu,cpuacct:/job/step\n") == [1.5, 2.5]


def test_quotas_are_found_wherever_a_version_is_mounted(tmp_path):
    write_limit(tmp_path, "unified/job/cpu.max", "250000 100000")  # a system with both versions
    assert quotas(tmp_path, "1:name=systemd:/x\n0::/job\n") == [2.5]
    write_limit(tmp_path, "cpu,cpuacct/job/cpu.cfs_quota_us", 150_000)
    write_limit(tmp_path, "cpu,cpuacct/job/cpu.cfs_period_us", 100_000)
    write_limit(tmp_path, "cpuacct/job/cpu.cfs_quota_us", 1)
    assert quotas(tmp_path, "4:cpuacct,cpu:/job\n0::/\n") == [1.5]  # listed in another order


def test_lines_that_name_no_group_are_passed_over(tmp_path):
    write_limit(tmp_path, "cpu.max", "250000 100000")
    assert quotas(tmp_path, "\nnonsense\n0:\n::\n0::/\n") == [2.5]


@pytest.mark.parametrize("text", ["", "max", "x 100000", "50000 0", "50000", "-1 100000"])
def test_a_quota_that_is_none_bounds_nothing(tmp_path, text):
    write_limit(tmp_path, "cpu.max", text)
    assert quotas(tmp_path, "0::/\n") == []


@pytest.mark.parametrize(("texts", "cores"), [(["max 1"], 4), (["250000 100000"], 2), (["300000 100000", "5 10"], 1)])
def test_a_process_s_own_cores_are_the_least_of_affinity_and_quotas(tmp_path, monkeypatch, texts, cores):
    for depth, text in enumerate(texts):
        write_limit(tmp_path, f"{'a/' * depth}cpu.max", text)
    (tmp_path / "listing").write_text("0::/a/a\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "listing")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert machine.count_own_cores() == cores
