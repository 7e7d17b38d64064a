"""The SHA-256 of each file of a folder, listed as coreutils does: `sha256sum -c SHA256SUMS` checks the folder too.

SHA-256: FIPS 180-4; processors of today have instructions for it.
"""

import hashlib
import re

from hpcmoe.errors import CheckpointError
from hpcmoe.write.hdf5 import raise_as_checkpoint_error, sync

CHECKSUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)")


def compute_digest(path):
    """Compute a file's SHA-256 -> hexadecimal."""
    with raise_as_checkpoint_error(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder, digest_of_name):
    """Write a folder's list {name: digest}."""
    path = folder / CHECKSUMS
    with raise_as_checkpoint_error(path, "written"):
        path.write_text("".join(f"{digest}  {name}\n" for name, digest in digest_of_name.items()))
        sync(path)


def read_checksums(folder):
    """Read a folder's list -> {name: digest}. Raises CheckpointError where it is missing or damaged."""
    path = folder / CHECKSUMS
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    with raise_as_checkpoint_error(path, "read"):
        lines = path.read_text(errors="replace").splitlines()
    found = [LINE.fullmatch(line) for line in lines]
    if None in found:
        raise CheckpointError(f"{path}: line {found.index(None) + 1} is no checksum")
    return {match[2]: match[1] for match in found}


def check_checksum(path, sums):
    """Check that a file is there with the bytes that its folder's list knows."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.name not in sums:
        raise CheckpointError(f"{path.parent / CHECKSUMS} has no checksum of {path.name}")
    if compute_digest(path) != sums[path.name]:
        raise CheckpointError(f"{path} is altered: it does not match its checksum in {CHECKSUMS}")
