"""Text files: those that the patterns of [data] match, each once, and their state when they were found."""

import fnmatch
import functools
import glob
import logging
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hpcmoe.config import DataConfig
from hpcmoe.errors import ConfigError
from hpcmoe.messages import printable
from hpcmoe.paths import expand_pattern

log = logging.getLogger(__name__)

# Reasons why a path is no text.
_FOLDER, _EMPTY_FILE, _IRREGULAR = "folders", "empty", "no regular files"
_DANGLING, _OWN = "links to nothing", "in the run's own folder"
_EXCLUDED, _DUPLICATE = "taken by exclude", "other names of the same files"
_MAX_NAMED = 5  # patterns in one line


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """State of a file when it was found."""

    size: int  # bytes
    mtime_ns: int
    ctime_ns: int
    inode: int

    def holds(self, now: "Stamp") -> bool:
        """Return True if a file is the one that was found, unchanged.

        A new inode alone is no change, since some file systems number anew what they evicted; nor is a new ctime, as
        after a new hard link.
        """
        is_there = self.inode == now.inode or self.ctime_ns == now.ctime_ns
        return is_there and (self.size, self.mtime_ns) == (now.size, now.mtime_ns)


def make_stamp(info: os.stat_result) -> Stamp:
    """Build a Stamp of what stat() returns."""
    return Stamp(size=info.st_size, mtime_ns=info.st_mtime_ns, ctime_ns=info.st_ctime_ns, inode=info.st_ino)


def find_files(data: DataConfig, own_folder: str | os.PathLike | None = None) -> dict[str, Stamp]:
    """Find the text files of [data], each once whatever its names -> {path: Stamp}, ordered by path.

    The run's own folder and those of earlier runs of its name hold no text. Logs the patterns without text and what was
    left out. Raises ConfigError where nothing is found, or a file given by name is no text.
    """
    exclude = [expand_placeholders(pattern, "exclude") for pattern in data.exclude]
    is_own = make_own_test(own_folder)

    # Sort what each pattern matches into text and other paths.
    found: dict[str, os.stat_result] = {}
    left_out: dict[str, str] = {}
    silent = []
    for pattern in data.files:
        path = expand_placeholders(pattern, "files")
        if os.path.lexists(path) or not glob.has_magic(path):
            taken, left = stat_named(path, is_own)
        else:
            taken, left = stat_matches(match(path), exclude, is_own)
        found |= taken
        left_out |= left
        if not taken:
            silent.append(f"{printable(path)} matches {count_reasons(left) or 'nothing'}")

    # Keep each file by one name.
    files = drop_duplicates(found, left_out)
    log_left_out(data, files, left_out, silent)
    return files


def expand_placeholders(pattern: str, key: str) -> str:
    """Replace ~, $VARIABLES and {stdlib} in a pattern of [data]."""
    expanded = expand_pattern(pattern, f"[data] {key}")
    return expanded.replace("{stdlib}", sysconfig.get_path("stdlib")) if "{stdlib}" in expanded else expanded


def log_left_out(data: DataConfig, files: dict[str, Stamp], left_out: dict[str, str], silent: list[str]) -> None:
    """Log what was left out and the patterns without text. Raises ConfigError where no file has any."""
    named = "; ".join(silent[:_MAX_NAMED]) + f"; and {len(silent) - _MAX_NAMED} more" * (len(silent) > _MAX_NAMED)
    if not files:
        patterns = printable(str(list(data.files[:_MAX_NAMED])))
        raise ConfigError(f"[data] files = {patterns}, less [data] exclude: no file with text matches; {named}")
    if silent:
        log.warning("[data] files: %s", named)
    if counted := count_reasons({path: why for path, why in left_out.items() if path not in files}):
        log.info("[data] files: left out: %s", counted)


def count_reasons(left_out: dict[str, str]) -> str:
    """Format how many paths were left out for each reason."""
    return ", ".join(f"{count} {why}" for why, count in Counter(left_out.values()).items() if why != _FOLDER)


def drop_duplicates(found: dict[str, os.stat_result], left_out: dict[str, str]) -> dict[str, Stamp]:
    """Keep each file once, by its first name; add its other names to left_out."""
    files, seen = {}, set()
    for path, info in sorted(found.items()):
        if (info.st_dev, info.st_ino) in seen:
            left_out[path] = _DUPLICATE
        else:
            seen.add((info.st_dev, info.st_ino))
            files[path] = make_stamp(info)
    return files


def stat_named(path: str, is_own: Callable[[str], bool]) -> tuple[dict[str, os.stat_result], dict[str, str]]:
    """Return a file given by name as stat_matches() would. Raises ConfigError where it is no regular file, or own."""
    what = f"[data] files: {printable(path)}"
    try:
        info = os.stat(path)
    except FileNotFoundError:
        raise ConfigError(f"{what}: {'a link to nothing' if os.path.lexists(path) else 'no such file'}") from None
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror}") from None
    why = find_reason(path, info, is_own)
    hint = f"a folder; its files are {printable(os.path.join(path, '*'))}"
    if problem := {_FOLDER: hint, _OWN: _OWN, _IRREGULAR: "no regular file"}.get(why):
        raise ConfigError(f"{what}: is {problem}")
    return ({}, {path: why}) if why else ({path: info}, {})


def stat_matches(
    paths: Iterable[str], exclude: list[str], is_own: Callable[[str], bool]
) -> tuple[dict[str, os.stat_result], dict[str, str]]:
    """Split files with text from what else a pattern matches -> ({path: stat}, {path: why it is no text})."""
    taken, left_out = {}, {}
    for path in paths:
        try:
            info = os.stat(path)
            why = find_reason(path, info, is_own)
        except OSError:
            why = _DANGLING
        if why != _FOLDER and any(is_excluded(path, pattern) for pattern in exclude):
            why = _EXCLUDED
        if why:
            left_out[path] = why
        else:
            taken[path] = info
    return taken, left_out


def is_excluded(path: str, pattern: str) -> bool:
    """Return True if a path is or matches a pattern of exclude, both as written or both normalized."""
    plain = os.path.abspath(path) if os.path.isabs(pattern) else os.path.normpath(path)
    spellings = {(path, pattern), (plain, os.path.normpath(pattern))}
    return any(each == wanted or fnmatch.fnmatch(each, wanted) for each, wanted in spellings)


def find_reason(path: str, info: os.stat_result, is_own: Callable[[str], bool]) -> str:
    """Return why an existing path is no text, "" where it is."""
    if stat.S_ISDIR(info.st_mode):
        return _FOLDER
    if not stat.S_ISREG(info.st_mode):
        return _IRREGULAR
    if is_own(path):
        return _OWN
    return _EMPTY_FILE if info.st_size == 0 else ""


def make_own_test(own_folder: str | os.PathLike | None) -> Callable[[str], bool]:
    """Build the test whether a path leads into the run's own folder, or into that of an earlier run of its name."""
    owned = set() if own_folder is None else {identify(path) for path in list_own_folders(own_folder)} - {None}

    @functools.cache
    def is_in_owned(folder: str) -> bool:
        """Return True if a folder, or one that it is in, is owned."""
        parent = os.path.dirname(folder)
        return identify(folder) in owned or (parent != folder and is_in_owned(parent))

    return lambda path: bool(owned) and is_in_owned(os.path.dirname(os.path.realpath(path)))


def list_own_folders(own_folder: str | os.PathLike) -> Iterator[str]:
    """Yield the run's own folder, and those of earlier runs of its name beside it or beside what it is a link to."""
    for path in {os.path.abspath(own_folder), os.path.realpath(own_folder)}:
        yield path
        parent, name = os.path.split(path)
        for sibling in glob.glob(f"{glob.escape(name)}.*/run.h5", root_dir=parent):
            if re.fullmatch(r"previous|\d+", os.path.dirname(sibling)[len(name) + 1 :]):
                yield os.path.join(parent, os.path.dirname(sibling))


def identify(path: str) -> tuple[int, int] | None:
    """Return (device, inode), the same for all names of a file or folder; None where there is none."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


def match(pattern: str) -> Iterator[str]:
    """Yield the paths that a pattern matches; its leading folders that exist as written are not patterns."""
    parts = [part for part in pattern.split("/") if part]
    base = "/" if pattern.startswith("/") else ""
    while len(parts) > 1 and os.path.lexists(os.path.join(base, parts[0])):
        base = os.path.join(base, parts.pop(0))
    return match_below(base, parts)


def match_below(base: str, parts: list[str]) -> Iterator[str]:
    """Yield the paths below a folder, "" for the current one, that match the parts of a pattern."""
    if "**" not in parts:
        yield from (os.path.join(base, name) for name in glob.glob("/".join(parts), root_dir=base or None))
        return
    at = parts.index("**")
    rest = parts[at:]
    while rest[:1] == ["**"]:
        rest = rest[1:]
    for top in match_below(base, parts[:at]) if at else [base]:
        for folder in walk(top):
            yield from match_below(folder, rest or ["*"])


def walk(top: str) -> Iterator[str]:
    """Yield a folder and all below it, each once whatever links lead to it, by its own name if it has one there."""
    seen, tops = set(), [top]
    for start in tops:
        for folder, names, _ in os.walk(start or "."):
            if (identity := identify(folder)) in seen:
                names.clear()
                continue
            seen.add(identity)
            inside = folder if start else folder[2:]  # as it is written where the walk begins at no folder
            yield inside
            names[:] = sorted(name for name in names if not name.startswith("."))
            tops += [path for name in names if os.path.islink(path := os.path.join(inside, name))]
