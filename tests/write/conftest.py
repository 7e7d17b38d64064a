"""Disks that are full, and programs that are killed."""

import os
import signal
import subprocess
import sys

import pytest
from launch import HANG_SECONDS
from limits import limit_file_size


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root, and not in every container, can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def file_size_limit():
    """Give a context manager under which this process cannot make a file larger than some bytes."""
    return limit_file_size


@pytest.fixture
def run_until_killed():
    """Give a function that runs a Python program which must end by SIGKILL -> its standard output."""

    def run(program, *arguments):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        return ended.stdout

    return run
