"""A list of checksums is coreutils' own, and tells which file is not what it was."""

import shutil
import subprocess

import pytest

from hpcmoe.errors import CheckpointError
from hpcmoe.write.checksums import CHECKSUMS, check_checksum, compute_digest, read_checksums, write_checksums


@pytest.fixture
def folder(tmp_path):
    """Make a folder of two files and their list."""
    for name, content in (("a.h5", b"abc"), ("b.h5", bytes(1 << 20))):
        (tmp_path / name).write_bytes(content)
    write_checksums(tmp_path, {name: compute_digest(tmp_path / name) for name in ("a.h5", "b.h5")})
    return tmp_path


def test_digest_is_the_published_one(folder):
    # FIPS 180-2, appendix B.1
    assert compute_digest(folder / "a.h5") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_list_comes_back_and_all_is_well(folder):
    sums = read_checksums(folder)
    assert list(sums) == ["a.h5", "b.h5"]
    for name in sums:
        check_checksum(folder / name, sums)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_coreutils_agree(folder):
    command = ["sha256sum", "--strict", "-c", CHECKSUMS]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    (folder / "a.h5").write_bytes(b"abd")
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1


@pytest.mark.parametrize("at", [0, 1 << 10, (1 << 20) - 1])
def test_one_bit_is_enough(folder, at):
    content = bytearray((folder / "b.h5").read_bytes())
    content[at] ^= 4
    (folder / "b.h5").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        check_checksum(folder / "b.h5", read_checksums(folder))
    assert str(error.value) == f"{folder}/b.h5 is altered: it does not match its checksum in {CHECKSUMS}"


def test_missing_files_and_lines(folder):
    sums = read_checksums(folder)
    del sums["a.h5"]
    with pytest.raises(CheckpointError, match=r"SHA256SUMS has no checksum of a\.h5$"):
        check_checksum(folder / "a.h5", sums)
    (folder / "b.h5").unlink()
    with pytest.raises(CheckpointError, match=r"b\.h5 is missing$"):
        check_checksum(folder / "b.h5", sums)
    (folder / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match=r"SHA256SUMS is missing$"):
        read_checksums(folder)


@pytest.mark.parametrize("line", ["", "half a line", "0123  a.h5", f"{'f' * 64}  ../a.h5", "\0\xff"])
def test_damaged_list_is_one_line(folder, line):
    with (folder / CHECKSUMS).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(CheckpointError) as error:
        read_checksums(folder)
    assert str(error.value) == f"{folder}/{CHECKSUMS}: line 3 is no checksum"
