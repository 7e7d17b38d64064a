"""A folder of pieces, read to the last byte before anything is taken from it: each file by one rank, all at once."""

from hpcmoe.errors import on_all, on_root
from hpcmoe.write.checksums import check_checksum, read_checksums
from hpcmoe.write.pieces import MASTER, check_files


def verify_pieces(comm, folder):
    """Check that each file of a folder that write_pieces wrote is there, whole and unaltered. Collective over comm.

    Raises CheckpointError on all ranks: one line that names a file and what is wrong with it.
    """
    sums, names = on_root(comm, lambda: verify_master(folder))
    on_all(comm, lambda: check_checksums(folder, names[comm.rank :: comm.size], sums))


def verify_master(folder):
    """Check the list of checksums and the master -> (digest by name, names of the ranks' files, the largest first)."""
    sums = read_checksums(folder)
    check_checksum(folder / MASTER, sums)  # before HDF5 reads it
    _, bytes_of_file = check_files(folder)
    return sums, sorted(bytes_of_file, key=bytes_of_file.get, reverse=True)


def check_checksums(folder, names, sums):
    """Check some files' bytes."""
    for name in names:
        check_checksum(folder / name, sums)
