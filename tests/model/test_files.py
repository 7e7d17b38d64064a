"""Each file of text is found once, whatever leads to it; what is none is left out, or rejected in one line."""

import logging
import os
import pathlib
import socket
import sysconfig

import pytest

from hpcmoe.config import DataConfig
from hpcmoe.errors import ConfigError
from hpcmoe.model.files import Stamp, find_files, match


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to be in, which is HOME too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write(*paths, text=b"some text"):
    """Write files, with the folders that they are in."""
    for path in map(os.fsencode, paths):
        os.makedirs(os.path.dirname(path) or b".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(text)


def find(*patterns, exclude=(), own_folder=None):
    """Find files -> list of paths."""
    return list(find_files(DataConfig(files=patterns, exclude=tuple(exclude)), own_folder))


def catch_error(*patterns, **more):
    """Look for files that cannot be had -> the one line that says why."""
    with pytest.raises(ConfigError) as caught:
        find(*patterns, **more)
    assert str(caught.value).startswith("[data] files") and str(caught.value).isprintable()
    return str(caught.value)


def test_patterns_find_files_in_the_order_of_their_paths(here):
    write("b.txt", "a.txt", "c.py", "sub/d.txt", "sub/deep/e.txt", ".hidden.txt", ".git/f.txt")
    assert find("*.txt") == ["a.txt", "b.txt"]
    assert find("*/*.txt", "c.*") == ["c.py", "sub/d.txt"]
    assert find("**/*.txt") == ["a.txt", "b.txt", "sub/d.txt", "sub/deep/e.txt"]
    assert find("sub/**") == ["sub/d.txt", "sub/deep/e.txt"]
    assert find("**/**/deep/**/*.txt", "./a*") == ["./a.txt", "sub/deep/e.txt"]
    assert find(f"{here}//s*/*.txt") == [f"{here}/sub/d.txt"]
    assert find("~/b*", "$HOME/a.txt") == [f"{here}/a.txt", f"{here}/b.txt"]


def test_stdlib_is_pythons_own_library():
    stdlib = sysconfig.get_path("stdlib")
    assert str(pathlib.Path(stdlib, "ast.py")) in find("{stdlib}/*.py")
    found = find_files(DataConfig())
    assert list(found) == sorted(found) and sum(stamp.size for stamp in found.values()) > 5_000_000
    assert not any("site-packages" in path or "/test/" in path for path in found)


@pytest.mark.parametrize(
    "patterns",
    [
        ("a.txt", "./a.txt"),
        ("a.txt", "{here}/a.txt", "$HOME/*.txt"),
        ("*.txt", "sub/../a.txt", "sub/*"),
        ("**/*.txt", "*/*/*/*/a.txt"),
        ("**",),
    ],
)
def test_a_file_is_found_once_whatever_its_spellings_and_links(here, patterns):
    write("a.txt")
    os.symlink("a.txt", "link.txt")
    os.link("a.txt", "other.txt")
    os.makedirs("sub")
    for loop in ("sub/up", "sub/again", "around"):
        os.symlink(here, loop)
    (path,) = find(*(pattern.replace("{here}", str(here)) for pattern in patterns))
    assert os.path.samefile(path, "a.txt")


def test_a_folder_is_walked_by_its_own_name_and_through_links_that_lead_out(here, tmp_path_factory):
    write("real/x.txt")
    os.symlink("real", "alias")
    outside = tmp_path_factory.mktemp("outside")
    write(outside / "y.txt")
    os.symlink(outside, "to-outside")
    assert find("**/*.txt") == ["real/x.txt", "to-outside/y.txt"]
    assert find("alias/**/*.txt") == ["alias/x.txt"]


def test_names_that_exist_are_no_patterns(here):
    write("data[1].txt", "data1.txt", "[ab]/x.txt", "a/x.txt", "a/y.txt", "what?.txt", "whats.txt", "$COSTS.txt")
    assert find("data[1].txt", "what?.txt", "$COSTS.txt") == ["$COSTS.txt", "data[1].txt", "what?.txt"]
    assert find("[ab]/*.txt") == ["[ab]/x.txt"]
    assert find("[a]/*.txt", "data[1-9].txt") == ["a/x.txt", "a/y.txt", "data1.txt"]
    assert list(match(f"{here}/[ab]/x*")) == [f"{here}/[ab]/x.txt"]


def test_names_that_are_not_utf_8_or_have_line_breaks_are_names(here, caplog):
    write(b"bad/x\xff.txt", b"bad/two\nlines.txt", b"bad/\xe4/z.txt")
    with caplog.at_level(logging.INFO):
        assert find("bad/**/*.txt", "bad/n*") == ["bad/two\nlines.txt", "bad/x\udcff.txt", "bad/\udce4/z.txt"]
    assert "bad/n* matches nothing" in caplog.text
    os.remove(b"bad/x\xff.txt")
    os.symlink("nothing", b"bad/x\xff.txt")
    assert catch_error("bad/x\udcff.txt") == r"[data] files: bad/x\udcff.txt: a link to nothing"


def test_what_is_left_out_and_what_matches_nothing_is_told(here, caplog):
    write("a.txt", "b.txt", "sub/c.txt", "sub/d.txt", "test/t.txt")
    write("empty.txt", text=b"")
    os.mkfifo("fifo.txt")
    os.symlink("nothing", "dangling.txt")
    os.link("a.txt", "z.txt")
    with caplog.at_level(logging.INFO):
        found = find("*.txt", "*/*.txt", "test/*", "none/*.txt", exclude=["sub/*", "test/*"])
    assert found == ["a.txt", "b.txt"]
    logged = {record.levelname: record.getMessage() for record in caplog.records}
    silent = "*/*.txt matches 3 taken by exclude; test/* matches 1 taken by exclude; none/*.txt matches nothing"
    assert logged["WARNING"] == f"[data] files: {silent}"
    counts = logged["INFO"].removeprefix("[data] files: left out: ").split(", ")
    assert sorted(counts) == [
        "1 empty", "1 links to nothing", "1 no regular files", "1 other names of the same files", "3 taken by exclude"
    ]  # fmt: skip


def test_a_named_file_is_taken_though_a_pattern_to_exclude_matches_it(here):
    write("test/a.txt", "test/b.txt")
    assert find("test/a.txt", "test/*.txt", exclude=["*/*"]) == ["test/a.txt"]


def test_what_is_excluded_is_expanded_too(here):
    write("a.txt", "sub/b.txt")
    assert find("~/**", exclude=["$HOME/sub/*"]) == [f"{here}/a.txt"]
    write("data[1].txt")
    assert find("*.txt", exclude=["data[1].txt"]) == ["a.txt"]
    with pytest.raises(ConfigError, match=r"^\[data\] exclude = '\$NOWHERE/x': \$NOWHERE is not set, or is empty$"):
        find("*", exclude=["$NOWHERE/x"])


def test_what_is_excluded_is_left_out_however_it_is_spelled(here):
    write("a.txt", "b.txt", "sub/c.txt")
    for exclude in ("b.txt", "./b.txt", "sub/../b.txt", f"{here}/b.txt", "$HOME/[b].txt"):
        for pattern in ("*.txt", "./*.txt", f"{here}/*.txt", f"{here}/sub/../*.txt"):
            if not os.path.isabs(pattern) or exclude[0] in "/$":
                assert [os.path.basename(path) for path in find(pattern, exclude=[exclude])] == ["a.txt"]
    assert find("./**", exclude=["*/sub/*"]) == ["./a.txt", "./b.txt"]


def test_what_is_named_and_has_no_text_is_refused_in_one_line(here):
    write("a.txt", "sub/b.txt")
    write("empty.txt", text=b"")
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name in ("fifo", "socket", "/dev/null"):
            assert catch_error("a.txt", name) == f"[data] files: {name}: is no regular file"
    assert catch_error("a.txt", "sub") == "[data] files: sub: is a folder; its files are sub/*"
    assert catch_error("a.txt", "none.txt") == "[data] files: none.txt: no such file"
    assert catch_error("a.txt/b") == "[data] files: a.txt/b: Not a directory"
    assert catch_error("loop") == "[data] files: loop: Too many levels of symbolic links"
    assert catch_error("x" * 300) == f"[data] files: {'x' * 300}: File name too long"
    assert catch_error("~nobody-here/x") == "[data] files = '~nobody-here/x': no user nobody-here"
    none = "less [data] exclude: no file with text matches; "
    assert catch_error("empty.txt") == f"[data] files = ['empty.txt'], {none}empty.txt matches 1 empty"
    assert catch_error("n*", "su*") == f"[data] files = ['n*', 'su*'], {none}n* matches nothing; su* matches nothing"
    assert catch_error("*/*.txt", exclude=["s*"]).endswith(f"{none}*/*.txt matches 1 taken by exclude")
    assert catch_error(*(f"{number}*" for number in range(9))).endswith("4* matches nothing; and 4 more")


def test_the_runs_own_folder_is_never_text(here):
    write(
        "out/run/run.h5", "out/run/deep/x", "out/run.previous/run.h5", "out/run.12/run.h5", "out/runs/a", "out/run.3/b"
    )
    write("scratch/run.h5", "scratch.1/run.h5", "a.txt")
    os.symlink("out/run", "alias")
    os.symlink("../scratch", "out/linked")
    others = ["a.txt", "out/run.3/b", "out/runs/a", "scratch.1/run.h5", "scratch/run.h5"]
    assert find("**", own_folder=pathlib.Path("out/run")) == others
    assert find("**", own_folder="out/linked") == sorted(set(find("**")) - {"scratch/run.h5", "scratch.1/run.h5"})
    assert find("scratch/*", "*.txt", own_folder=here / "out/linked") == ["a.txt"]
    assert catch_error("alias/run.h5", own_folder="out/run") == "[data] files: alias/run.h5: is in the run's own folder"
    assert "alias/* matches 1 in the run's own folder" in catch_error("alias/*", own_folder="out/run")
    assert find("*.txt", own_folder="not/there/yet") == ["a.txt"]


def test_a_stamp_holds_until_a_file_is_another_or_has_other_bytes():
    then = Stamp(size=5, mtime_ns=1, ctime_ns=1, inode=1)
    linked, renumbered = Stamp(size=5, mtime_ns=1, ctime_ns=2, inode=1), Stamp(size=5, mtime_ns=1, ctime_ns=1, inode=2)
    assert then.holds(then) and then.holds(linked) and then.holds(renumbered)
    assert not then.holds(Stamp(size=5, mtime_ns=1, ctime_ns=2, inode=2))
    assert not then.holds(Stamp(size=4, mtime_ns=1, ctime_ns=1, inode=1))
    assert not then.holds(Stamp(size=5, mtime_ns=2, ctime_ns=1, inode=1))
