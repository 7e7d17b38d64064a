"""The SHA-256 of each file of a folder, listed as coreutils does: `sha256sum -c SHA256SUMS` checks the folder too.

SHA-256: FIPS 180-4; processors of today have instructions for it.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from hpcmoe.errors import CheckpointError
from hpcmoe.replacing import sync
from hpcmoe.write.hdf5 import check_exists, checkpoint_errors

CHECKSUMS = "SHA256SUMS"
_MOST_BYTES = 2**26  # of a list: half a million ranks' files
_LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)")


def compute_digest(path: Path) -> str:
    """Compute a file's SHA-256 -> hexadecimal."""
    with checkpoint_errors(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, digest_of_name: Mapping[str, str]) -> None:
    """Write a folder's list {name: digest}."""
    path = folder / CHECKSUMS
    with checkpoint_errors(path, "written"):
        path.write_text("".join(f"{digest}  {name}\n" for name, digest in digest_of_name.items()))
        sync(path)


def read_checksums(folder: Path) -> dict[str, str]:
    """Read a folder's list -> {name: digest}. Raises CheckpointError where it is missing or damaged."""
    path = folder / CHECKSUMS
    check_exists(path)
    with checkpoint_errors(path, "read"):
        if (num_bytes := path.stat().st_size) > _MOST_BYTES:
            raise CheckpointError(f"{path}: {num_bytes} bytes, more than {_MOST_BYTES}, which no list of files has")
        lines = path.read_text(errors="replace").splitlines()
    digest_of_name = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(f"{path}: line {number} is no checksum")
        digest_of_name[match[2]] = match[1]
    return digest_of_name


def check_checksum(path: Path, digest_of_name: Mapping[str, str]) -> None:
    """Check that a file is there with the bytes that its folder's list knows."""
    check_exists(path)
    if path.name not in digest_of_name:
        raise CheckpointError(f"{path.parent / CHECKSUMS} has no checksum of {path.name}")
    if compute_digest(path) != digest_of_name[path.name]:
        raise CheckpointError(f"{path} is altered: it does not match its checksum in {CHECKSUMS}")
