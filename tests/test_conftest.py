"""A failing MPI test ends the run in seconds, with an exit status that is not 0 and the traceback of its rank."""

import textwrap

import pytest
from launch import ROOT, mpirun

TESTS = {
    "one_fails": """
        @pytest.mark.mpi
        def test_it(comm):
            print("heard from the test")
            assert comm.rank != 1, "on one rank"
    """,
    "all_fail": """
        @pytest.mark.mpi
        def test_it(comm):
            assert comm.rank > 9, "on every rank"
    """,
    "raises_before_collective": """
        @pytest.mark.mpi
        def test_it(comm):
            if comm.rank == 1:
                raise ValueError("on one rank")
            comm.allreduce(1)
    """,
    "rank_0_raises_before_collective": """
        @pytest.mark.mpi
        def test_it(comm):
            if comm.rank == 0:
                raise ValueError("on the first rank")
            comm.allreduce(1)
    """,
    "hangs": """
        @pytest.mark.mpi(seconds=2)
        def test_it(comm):
            if comm.rank == 1:
                time.sleep(1000)
            comm.Barrier()
    """,
    "fixture_fails": """
        @pytest.fixture
        def broken(comm):
            assert comm.rank != 1, "in the fixture"

        @pytest.mark.mpi
        def test_it(comm, broken):
            comm.allreduce(1)
    """,
    "import_fails": """
        from mpi4py import MPI

        assert MPI.COMM_WORLD.rank != 1, "at import"

        @pytest.mark.mpi
        def test_it(comm):
            comm.allreduce(1)
    """,
}
EXPECTED = {
    "one_fails": ("[rank 1 of 2] E       AssertionError: on one rank", "heard from the test", "failed on rank 1 of 2"),
    "all_fail": ("[rank 1 of 2] E       AssertionError: on every rank", "E       AssertionError: on every rank"),
    "raises_before_collective": ("[rank 1 of 2] E           ValueError: on one rank", "the other ranks do not follow"),
    "rank_0_raises_before_collective": ("[rank 0 of 2] E           ValueError: on the first rank",),
    "hangs": ("[rank 1 of 2]     time.sleep(1000)", "[rank 0 of 2]     comm.Barrier()"),
    "fixture_fails": ("[rank 1 of 2] E       AssertionError: in the fixture", "failed on rank 1 of 2"),
    "import_fails": ("[rank 1 of 2] E   AssertionError: at import", "another rank could not collect the tests"),
}

USUAL = ("one_fails", "raises_before_collective", "hangs", "import_fails")


def pytest_at_2_ranks(folder, body):
    """Run pytest on a file of this body, with this project's conftest, at two ranks."""
    file = folder / "test_it.py"
    file.write_text("import time\n\nimport pytest\n\n" + textwrap.dedent(body))
    options = ["-c", ROOT / "setup.cfg", "--rootdir", folder, "-p", "conftest", "-p", "no:cacheprovider", "--color=no"]
    return mpirun(2, "-m", "pytest", "--with-mpi", *options, file)


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.full) for n in TESTS])
def test_a_failure_ends_the_run_with_its_traceback(name, tmp_path):
    ended = pytest_at_2_ranks(tmp_path, TESTS[name])
    assert ended.status != 0, ended
    for text in EXPECTED[name]:
        assert text in ended.output + ended.errors, ended


def test_what_passes_or_is_skipped_on_one_rank_ends_0(tmp_path):
    body = """
        @pytest.mark.mpi
        def test_sum(comm):
            assert comm.allreduce(1) == comm.size

        @pytest.mark.mpi
        def test_skip(comm):
            if comm.rank == 1:
                pytest.skip("only here")
    """
    ended = pytest_at_2_ranks(tmp_path, body)
    assert ended.status == 0, ended
    assert "1 passed, 1 skipped" in ended.output, ended
    assert "[rank 1" not in ended.errors, ended
