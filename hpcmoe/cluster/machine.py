"""The machine under a rank: the memory and the processor time it may use, and its CUDA devices."""

import os
import pathlib
import re

import psutil

CGROUPS = pathlib.Path("/sys/fs/cgroup")
OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")
_QUOTA_ROUNDING = 1e-6  # CPUs: a quota over its period may miss a whole number by its last bits
DEVICE_FOLDERS = ((pathlib.Path("/proc/driver/nvidia/gpus"), r".+"), (pathlib.Path("/dev"), r"nvidia\d+"))


def read_memory_bytes() -> int:
    """Read how much memory this process may use: the machine's, or its control group's limit where that is less."""
    return min([psutil.virtual_memory().total, *read_cgroup_limits(CGROUPS, OWN_CGROUPS)])


def count_own_cores() -> int:
    """Count the cores that this process can keep busy, by affinity and quotas."""
    return whole_cores(min([len(os.sched_getaffinity(0)), *(cpus for _, cpus in read_own_quotas())]))


def whole_cores(cpus: float) -> int:
    """Return the whole cores of a quota, one at least: half a CPU keeps one thread busy, half of the time."""
    return max(int(cpus + _QUOTA_ROUNDING), 1)


def read_own_quotas() -> tuple[tuple[str, float], ...]:
    """Read the quotas of processor time above this process -> (group, CPUs) each, outermost first."""
    return read_cpu_quotas(CGROUPS, OWN_CGROUPS)


def read_cgroup_limits(mount: pathlib.Path, listing: pathlib.Path) -> list[int]:
    """Read the memory limits on all levels above this process, of either version of cgroups -> bytes."""
    levels = find_cgroups(mount, listing, "memory")
    texts = [read_words(level / name) for level in levels for name in ("memory.max", "memory.limit_in_bytes")]
    return [int(words[0]) for words in texts if words and words[0].isdecimal()]


def read_cpu_quotas(mount: pathlib.Path, listing: pathlib.Path) -> tuple[tuple[str, float], ...]:
    """Read the quotas of processor time above this process, either version's -> (group, CPUs) each, outermost first.

    A group is named by its inode: in containers the paths of several may be alike.
    """
    quotas = []
    for level in find_cgroups(mount, listing, "cpu"):
        quota, period = (read_words(level / "cpu.max") + ["", ""])[:2]
        if not quota:
            quota, period = ("".join(read_words(level / f"cpu.cfs_{what}_us")) for what in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):
            status = level.stat()
            quotas.append((f"{status.st_dev}:{status.st_ino}", int(quota) / int(period)))
    return tuple(quotas)


def find_cgroups(mount: pathlib.Path, listing: pathlib.Path, controller: str) -> list[pathlib.Path]:
    """Return the folders of this process's control groups that may hold a controller's limits, outermost first."""
    levels: list[pathlib.Path] = []
    for line in read_lines(listing):
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if not path or (controllers and controller not in controllers.split(",")):
            continue
        steps = path.strip("/").split("/")
        for base in find_mounts(mount, controller if controllers else ""):
            # In a container the path may be the host's, of which only the top is mounted here.
            levels += [base.joinpath(*steps[:depth]) for depth in range(1 if steps == [""] else 0, len(steps) + 1)]
    return levels


def find_mounts(mount: pathlib.Path, controller: str) -> list[pathlib.Path]:
    """Return where a controller of version 1 is mounted, or version 2, which is beside them on a system with both."""
    if not controller:
        return [mount, *(folder for folder in [mount / "unified"] if folder.is_dir())]
    folders = sorted(folder for folder in mount.glob("*") if controller in folder.name.split(","))
    return [mount / controller] if mount / controller in folders else folders[:1]


def read_words(file: pathlib.Path) -> list[str]:
    """Read the words of a small file of the system, none where it is not there."""
    return [word for line in read_lines(file) for word in line.split()]


def read_lines(file: pathlib.Path) -> list[str]:
    """Read the lines of a small file of the system, none where it is not there or closed to this user."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def count_cuda_devices() -> int:
    """Count the CUDA devices that the driver shows on this node, 0 where there is no driver."""
    return max(
        sum(bool(re.fullmatch(pattern, entry.name)) for entry in folder.iterdir()) if folder.is_dir() else 0
        for folder, pattern in DEVICE_FOLDERS
    )
