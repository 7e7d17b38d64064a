"""Where mpi4py cannot load an MPI, one line says why and what mends it, and `make` has it built."""

import sys

import pytest
from launch import ROOT, mpirun

from hpcmoe import mpi_library, output
from hpcmoe.mpi_library import (
    BUILD,
    check_ranks,
    describe_error,
    find_bad_variable,
    find_missing_tools,
    find_mpicc,
    hide_pmix,
    import_mpi,
    main,
)  # fmt: skip
from hpcmoe.start import find_rank

WHEEL_ERROR = RuntimeError("cannot load MPI library\nlibmpi.so.12: cannot open shared object file: No such file")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Make the only folder of programs; tools(name, script) puts one there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MPICC", raising=False)

    def put(name, script="exit 0"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    return put


def test_a_library_that_is_not_there_is_one_line_with_the_command_that_mends_it(tools):
    mpirun, _, _ = tools("mpirun"), tools("mpicc"), tools("cc")
    line = describe_error(WHEEL_ERROR)
    assert "\n" not in line and "libmpi.so.12" in line and f"for the MPI of {mpirun}" in line
    assert f"{sys.executable} -m pip install {' '.join(BUILD)}" in line


def test_without_an_mpirun_pypis_mpich_is_offered(tools):
    assert f"no mpirun is on the PATH either: {sys.executable} -m pip install mpich" in describe_error(WHEEL_ERROR)


def test_without_mpi4py_it_is_to_be_installed(tools):
    line = describe_error(ModuleNotFoundError("No module named 'mpi4py'", name="mpi4py"))
    assert "mpi4py is not installed in" in line and "activate" in line and "pip install mpi4py mpich" in line


def test_what_a_build_lacks_is_named(tools, monkeypatch, tmp_path):
    monkeypatch.setattr(mpi_library.sysconfig, "get_path", lambda _: str(tmp_path))
    tools("mpirun")
    assert [name.split()[0] for name in find_missing_tools()] == ["mpicc", "Python.h", "a"]
    assert "install mpicc (Debian: libmpich-dev or libopenmpi-dev), Python.h" in describe_error(WHEEL_ERROR)


def test_the_mpicc_beside_the_mpirun_is_taken_unless_one_is_named(tools, monkeypatch, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    mpirun, mpicc = tools("mpirun"), tools("mpicc")
    (other / "mpicc").symlink_to(mpicc)
    (other / "mpirun").symlink_to(mpirun)
    monkeypatch.setenv("PATH", f"{other}:{tmp_path}")
    assert find_mpicc() == str(other / "mpicc")
    (other / "mpicc").unlink()
    assert find_mpicc() == mpicc
    monkeypatch.setenv("MPICC", "/elsewhere/mpicc")
    assert find_mpicc() == "/elsewhere/mpicc"


@pytest.mark.parametrize(
    ("environ", "first"),
    [
        ({}, True),
        ({"PMI_RANK": "0"}, True),
        ({"PMI_RANK": "3"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1"}, False),
        ({"RANK": "1"}, True),  # a script's, for other ends
    ],
)
def test_one_rank_speaks(environ, first, monkeypatch, capsys):
    monkeypatch.setattr(output, "DRAIN_SECONDS", 0)
    assert (find_rank(environ) == "0") is first
    with pytest.raises(SystemExit) as ended:
        output.exit_with_line("why", first)
    assert ended.value.code == 2 and capsys.readouterr().err == "hpcmoe: why\n" * first


@pytest.mark.parametrize("name", ["PMI_SIZE", "PMI_RANK", "PMI_FD"])
@pytest.mark.parametrize("text", ["abc", "-1", "1.5", "\u0663", "9x" * 4000])
def test_a_number_that_mpi_would_choke_on_is_one_line_before_it_starts(monkeypatch, capsys, name, text):
    monkeypatch.setattr(mpi_library, "clear_segments", lambda: None)
    monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit) as ended:
        import_mpi()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"hpcmoe: the environment's {name} = {text[:40]!r}: must be a whole number")
    assert find_bad_variable({name: ""}) is find_bad_variable({name: " 3 "}) is None


@pytest.mark.parametrize(
    ("library", "hides"),
    [
        ("MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ucx,ofi --with-pm=hydra", True),
        ("MPICH Version:      5.0.2\nMPICH configure:    --with-pmix=/usr --with-pm=no", False),
        ("Open MPI v5.0.11, package: Open MPI", False),
    ],
)
def test_an_mpich_without_pmix_does_not_see_a_launcher_that_speaks_it(library, hides):
    environ = {"PMIX_RANK": "1", "PMIX_NAMESPACE": "a", "PMI_RANK": "0"}
    with hide_pmix(library, environ):
        seen = [name in environ for name in ("PMIX_RANK", "PMIX_NAMESPACE", "PMI_RANK")]
        assert seen == [not hides, not hides, True]
    assert environ == {"PMIX_RANK": "1", "PMIX_NAMESPACE": "a", "PMI_RANK": "0"}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo size 2; echo size 2", None),
        ("echo size 1; echo size 1", "see worlds of 1, 1: mpi4py has loaded another MPI's library"),
        (
            "echo 'ImportError: no libmpi' >&2; echo done >&2; exit 1",
            "do not start: ImportError: no libmpi",
        ),
        ("exit 3", "do not start: status 3"),
    ],
)
def test_two_ranks_tell_whether_mpi4py_fits(tools, script, said):
    tools("mpirun", script)
    found = check_ranks()
    assert found is None if said is None else said in found


def test_what_does_not_fit_is_built_with_pips_arguments(tools, tmp_path, monkeypatch, capsys):
    tools("mpicc"), tools("cc")
    mark = tmp_path / "built"
    tools("mpirun", f"if [ -e {mark} ]; then echo size 2; echo size 2; else echo size 1; fi")
    monkeypatch.setattr(mpi_library, "find_missing_tools", list)
    calls = []
    monkeypatch.setattr(mpi_library, "build", lambda words: calls.append(words) or mark.touch() or 0)
    assert main(["--constraint", "constraints.txt"]) == 0
    assert calls == [["--constraint", "constraints.txt"]]
    assert "building mpi4py from source with" in capsys.readouterr().err
    assert main([]) == 0 and len(calls) == 1


@pytest.mark.parametrize(("status", "said"), [(1, "could not be built"), (0, "are they of one MPI?")])
def test_a_build_that_does_not_help_is_a_line_and_status_2(tools, monkeypatch, capsys, status, said):
    tools("mpirun", "echo size 1"), tools("mpicc"), tools("cc")
    monkeypatch.setattr(mpi_library, "find_missing_tools", list)
    monkeypatch.setattr(mpi_library, "build", lambda words: status)
    assert main([]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_build_that_lacks_something_is_not_begun(tools, monkeypatch, capsys):
    tools("mpirun", "echo size 1")
    monkeypatch.setattr(mpi_library, "build", None)
    assert main([]) == 2
    assert "install mpicc (Debian: libmpich-dev" in capsys.readouterr().err


def test_a_rank_that_cannot_import_the_program_ends_the_others(tmp_path):
    """They wait for it in their first collective call, it in the end of MPI for them."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, runpy, sys\n"
        "if os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')) == '1':\n"
        "    sys.modules['hpcmoe.config'] = None\n"
        "runpy.run_module('hpcmoe.main', run_name='__main__')\n"
    )
    ended = mpirun(2, program, "inputs/run.toml", timeout_seconds=120, PYTHONPATH=str(ROOT))
    assert ended.status != 0 and "hpcmoe.config" in ended.errors, ended
