"""What the machine under a rank tells: the memory it may use, its CUDA devices, and Slurm's switches."""

import pathlib
import re
import subprocess

import psutil

CGROUPS = pathlib.Path("/sys/fs/cgroup")
OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")
DEVICE_FOLDERS = ((pathlib.Path("/proc/driver/nvidia/gpus"), r".+"), (pathlib.Path("/dev"), r"nvidia\d+"))


def read_memory_bytes():
    """Read how much memory this process may use: the machine's, or its control group's limit where that is less."""
    return min([psutil.virtual_memory().total, *read_cgroup_limits(CGROUPS, OWN_CGROUPS)])


def read_cgroup_limits(mount, listing):
    """Read the memory limits on all levels above this process, of either version of cgroups -> list of bytes."""
    limits = []
    for line in listing.read_text().splitlines() if listing.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue

        # In a container the path may be the host's, of which only the top is mounted here.
        steps = path.strip("/").split("/")
        files = [base.joinpath(*steps[:depth], name) for depth in range(len(steps) + 1)]
        limits += [int(text) for file in files if file.is_file() and (text := file.read_text().strip()).isdigit()]
    return limits


def count_cuda_devices():
    """Count the CUDA devices that the driver shows on this node, 0 where there is no driver."""
    return max(
        sum(bool(re.fullmatch(pattern, entry.name)) for entry in folder.iterdir()) if folder.is_dir() else 0
        for folder, pattern in DEVICE_FOLDERS
    )


def ask_scontrol():
    """Ask Slurm for its lowest switches -> dict node name -> switch, empty when it does not answer."""
    rack_of_name = {}
    try:
        for line in show("topology"):
            switch = dict(word.partition("=")[::2] for word in line.split())
            if switch.get("Level") == "0":
                rack_of_name |= dict.fromkeys(show("hostnames", switch["Nodes"]), switch["SwitchName"])
    except (OSError, subprocess.SubprocessError):
        return {}
    return rack_of_name


def show(*words):
    """Run `scontrol show ...` -> its lines."""
    command = ["scontrol", "show", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.splitlines()
