"""The files of text: which ones the patterns of [data] name, each once, and how to tell that one has changed."""

import fnmatch
import glob
import logging
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hpcmoe.errors import ConfigError
from hpcmoe.messages import printable
from hpcmoe.paths import expand_pattern

log = logging.getLogger(__name__)

FOLDER, EMPTY_FILE, IRREGULAR = "folders", "empty", "no regular files"  # why something is no text
NOTHING, OWN = "links to nothing", "in the run's own folder"
EXCLUDED, AGAIN = "taken by exclude", "other names of the same files"
MOST_NAMED_PATTERNS = 5  # patterns in one line


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What a file was like when it was found."""

    size: int  # bytes
    mtime_ns: int
    ctime_ns: int
    inode: int

    def holds(self, now: "Stamp") -> bool:
        """Return True if a file is still the one that was found, and as it was.

        A new inode alone tells nothing, since some file systems number anew what they had forgotten, nor does a new
        ctime, as of a file that was given another link.
        """
        is_there = self.inode == now.inode or self.ctime_ns == now.ctime_ns
        return is_there and (self.size, self.mtime_ns) == (now.size, now.mtime_ns)


def make_stamp(info: os.stat_result) -> Stamp:
    """Keep what stat() tells of a file -> Stamp."""
    return Stamp(size=info.st_size, mtime_ns=info.st_mtime_ns, ctime_ns=info.st_ctime_ns, inode=info.st_ino)


def find_files(data, own_folder: str | os.PathLike | None = None) -> dict[str, Stamp]:
    """Find the files with text of [data], each once whatever its names -> {path: Stamp}, in the order of their paths.

    Nothing in the run's own folder, nor in those that earlier runs of its name left, is text. Raises ConfigError where
    there is no text, or a file that is named is none; logs which patterns give none, and what was left out.
    """
    exclude = [expand_placeholders(pattern, "exclude") for pattern in data.exclude]
    is_own = make_own(own_folder)
    found, left_out, silent = {}, {}, []
    for pattern in data.files:
        where = expand_placeholders(pattern, "files")
        if os.path.lexists(where) or not glob.has_magic(where):
            taken, left = take_named(where, is_own)
        else:
            taken, left = sort_out(match(where), exclude, is_own)
        found |= taken
        left_out |= left
        if not taken:
            silent.append(f"{printable(where)} matches {count_reasons(left) or 'nothing'}")
    files = drop_doubles(found, left_out)
    log_left_out(data, files, left_out, silent)
    return files


def expand_placeholders(pattern, key):
    """Put in a pattern of [data] what ~, $VARIABLES and {stdlib} stand for."""
    expanded = expand_pattern(pattern, f"[data] {key}")
    return expanded.replace("{stdlib}", sysconfig.get_path("stdlib")) if "{stdlib}" in expanded else expanded


def log_left_out(data, files, left_out, silent):
    """Log what was left out and which patterns give no text; ConfigError where none does."""
    named = "; ".join(silent[:MOST_NAMED_PATTERNS]) + f"; and {len(silent) - MOST_NAMED_PATTERNS} more" * (
        len(silent) > MOST_NAMED_PATTERNS
    )
    if not files:
        patterns = printable(str(list(data.files[:MOST_NAMED_PATTERNS])))
        raise ConfigError(f"[data] files = {patterns}, less [data] exclude: no file with text matches; {named}")
    if silent:
        log.warning("[data] files: %s", named)
    if counted := count_reasons({path: why for path, why in left_out.items() if path not in files}):
        log.info("[data] files: left out: %s", counted)


def count_reasons(left_out):
    """Count what was left out for each reason -> text."""
    return ", ".join(f"{count} {why}" for why, count in Counter(left_out.values()).items() if why != FOLDER)


def drop_doubles(found, left_out):
    """Keep each file once, by its first name -> {path: Stamp}; its other names are left out."""
    files, seen = {}, set()
    for path, info in sorted(found.items()):
        if (info.st_dev, info.st_ino) in seen:
            left_out[path] = AGAIN
        else:
            seen.add((info.st_dev, info.st_ino))
            files[path] = make_stamp(info)
    return files


def take_named(path, is_own):
    """Take a file by its own name -> ({path: stat}, {path: why it has no text}). Raises ConfigError for others."""
    what = f"[data] files: {printable(path)}"
    try:
        info = os.stat(path)
    except FileNotFoundError:
        raise ConfigError(f"{what}: {'a link to nothing' if os.path.lexists(path) else 'no such file'}") from None
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror}") from None
    why = why_no_text(path, info, is_own)
    if why == FOLDER:
        raise ConfigError(f"{what}: is a folder; its files are {printable(os.path.join(path, '*'))}")
    if why in (IRREGULAR, OWN):
        raise ConfigError(f"{what}: is {'no regular file' if why == IRREGULAR else why}")
    return ({}, {path: why}) if why else ({path: info}, {})


def sort_out(paths, exclude, is_own):
    """Tell files with text from what else a pattern matches -> ({path: stat}, {path: why it is no text})."""
    taken, left_out = {}, {}
    for path in paths:
        try:
            info = os.stat(path)
            why = why_no_text(path, info, is_own)
        except OSError:
            why = NOTHING
        if why != FOLDER and any(is_excluded(path, pattern) for pattern in exclude):
            why = EXCLUDED
        if why:
            left_out[path] = why
        else:
            taken[path] = info
    return taken, left_out


def is_excluded(path, pattern):
    """Return True if a path is or matches a pattern of exclude, both as they are written or in plain spelling."""
    plain = os.path.abspath(path) if os.path.isabs(pattern) else os.path.normpath(path)
    ways = {(path, pattern), (plain, os.path.normpath(pattern))}
    return any(each == wanted or fnmatch.fnmatch(each, wanted) for each, wanted in ways)


def why_no_text(path, info, is_own):
    """Say why something that is there is no text, "" where it is."""
    if stat.S_ISDIR(info.st_mode):
        return FOLDER
    if not stat.S_ISREG(info.st_mode):
        return IRREGULAR
    if is_own(path):
        return OWN
    return EMPTY_FILE if info.st_size == 0 else ""


def make_own(own_folder: str | os.PathLike | None) -> Callable[[str], bool]:
    """Make what tells whether a path leads into the run's own folder, or into what earlier runs of its name left."""
    owned = set() if own_folder is None else {identify(path) for path in list_own(own_folder)} - {None}
    known = {}

    def holds(folder):
        """Look at a folder, then at those that it is in."""
        if folder not in known:
            parent = os.path.dirname(folder)
            known[folder] = identify(folder) in owned or (parent != folder and holds(parent))
        return known[folder]

    return lambda path: bool(owned) and holds(os.path.dirname(os.path.realpath(path)))


def list_own(own_folder):
    """Yield the run's own folder, and those beside it or what it is a link to that hold an earlier run of its name."""
    for path in {os.path.abspath(own_folder), os.path.realpath(own_folder)}:
        yield path
        parent, name = os.path.split(path)
        for sibling in glob.glob(f"{glob.escape(name)}.*/run.h5", root_dir=parent):
            if re.fullmatch(r"previous|\d+", os.path.dirname(sibling)[len(name) + 1 :]):
                yield os.path.join(parent, os.path.dirname(sibling))


def identify(path):
    """Tell a file or folder from any other, whatever its name -> (device, inode), None where it is gone."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


def match(pattern: str) -> Iterator[str]:
    """Yield the paths that a pattern matches; its first folders are no pattern where they exist as they are written."""
    parts = [part for part in pattern.split("/") if part]
    base = "/" if pattern.startswith("/") else ""
    while len(parts) > 1 and os.path.lexists(os.path.join(base, parts[0])):
        base = os.path.join(base, parts.pop(0))
    return match_below(base, parts)


def match_below(base, parts):
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
    """Yield a folder and all below it, each once however many links lead to it, by its own name if it has one there."""
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
