"""Files that a command writes: checked before the work that leads to them, and replaced whole at its end."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Mapping

from hpcmoe.errors import ConfigError
from hpcmoe.messages import one_line


def check_outputs(inputs: Mapping[str, str | None], outputs: Mapping[str, str | None]) -> None:
    """Check that files can be written, and are neither inputs nor twice the same. Raises ConfigError.

    Both give a path, if there is one, by what it is for: "what -o writes".
    """
    taken = {what: pathlib.Path(path) for what, path in inputs.items() if path}
    for what, path in ((what, pathlib.Path(path)) for what, path in outputs.items() if path):
        with one_line_error(path):
            # Compare it with the inputs and the other outputs, by any of their names.
            for other, name in taken.items():
                if any(is_same(mine, its) for mine in with_part(path) for its in with_part(name)):
                    raise ConfigError(f"{one_line(path)}: cannot be written: is {other}")
            taken[what] = path
            if path.is_dir():
                raise ConfigError(f"{one_line(path)}: cannot be written: is a folder")

            # Try to write beside it: the permissions that root has say nothing of a read-only or full disk.
            with tempfile.TemporaryFile(dir=path.resolve().parent, buffering=0) as probe:
                probe.write(bytes(4096))


def with_part(path: str | pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Return the full path of a file, and the temporary name under which replace_file() writes it."""
    whole = pathlib.Path(path).resolve()
    return whole, whole.with_name(f"{whole.name}.part")


def is_same(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Return True if two paths are one file, or would be; of devices each is its own."""
    if one.exists() and other.exists():
        return one.is_file() and one.samefile(other)
    return one == other


@contextlib.contextmanager
def one_line_error(path: str | pathlib.Path) -> Iterator[None]:
    """Raise the system's errors inside the block as a ConfigError in one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter of a link that leads to itself
        why = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"{one_line(path)}: cannot be written: {why}") from None


@contextlib.contextmanager
def replace_file(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Open a temporary name that replaces the path when the block ends well; a device is written as it is."""
    whole, part = with_part(path)
    part = part if whole.is_file() or not whole.exists() else whole
    try:
        with one_line_error(path):
            yield part
            part.replace(whole)
    finally:
        if part != whole:
            part.unlink(missing_ok=True)
