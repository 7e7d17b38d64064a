"""Which tests run; MPI tests: what fails on one rank fails on all, rank 0 prints for the others, and nothing hangs."""

import faulthandler
import gc
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
import traceback

import pytest

TEST_SECONDS = 600.0  # what an MPI test may take, on a busy machine, its waiting for slower ranks included
EXIT_BARRIER_SECONDS = 5.0  # how long a rank that has failed waits for the others before it aborts them
OUTCOMES = ("passed", "skipped", "failed")  # the worst that a rank has counts for all

gc.disable()  # until all is imported, which stays: a tenth of a rank's start is looking through it


def pytest_addoption(parser):
    """Add the options that choose between the whole of the suite, what is usual, and a part of it."""
    parser.addoption("--full", action="store_true", help="run the cases marked full too: whole products")
    parser.addoption("--smoke", action="store_true", help="run of each test only its first case")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Make hypothesis repeatable; under --with-mpi, have the ranks go through the tests together."""
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]  # on a busy machine everything is
    settings.register_profile("hpcmoe", deadline=None, derandomize=True, suppress_health_check=slow)
    settings.load_profile("hpcmoe")
    if config.getoption("--with-mpi") or "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores
    from hpcmoe.segments import remove_abandoned_segments

    remove_abandoned_segments()  # what ranks killed by tests have left
    from mpi4py import MPI

    if config.getoption("--with-mpi"):
        config.pluginmanager.register(Ranks(MPI.COMM_WORLD.Dup(), config), "ranks")


def pytest_collection_modifyitems(config, items):
    """Leave out the cases marked full unless --full is given, and under --smoke all but each test's first case.

    Where processes share the files, those that start programs come first: then no process is left alone with these.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        clusters = {item.path for item in items if item.get_closest_marker("slurm")}
        items.sort(key=lambda item: (item.path not in clusters, len(item.path.parts)))
    if config.getoption("--full"):
        return
    kept = [item for item in items if item.get_closest_marker("full") is None]
    if config.getoption("--smoke"):
        kept = list({item.nodeid.partition("[")[0]: item for item in reversed(kept)}.values())[::-1]
    chosen = set(map(id, kept))
    if left_out := [item for item in items if id(item) not in chosen]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish():
    """Collect garbage from now on, but not among what was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def comm():
    """Open a communicator of all ranks for one test alone. Collective."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    yield comm
    comm.Free()


@pytest.fixture
def shared(comm):
    """Make one folder for the test on all ranks. Collective."""
    from hpcmoe.wait import barrier, broadcast

    folder = broadcast(comm, tempfile.mkdtemp(prefix="hpcmoe-test-") if comm.rank == 0 else None)
    yield pathlib.Path(folder)
    barrier(comm)
    if comm.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)


class Ranks:
    """Keep the ranks' pytest sessions in step."""

    def __init__(self, comm, config):
        self.comm = comm
        self.stderr = os.fdopen(os.dup(2), "w")  # during a test pytest captures the descriptor itself
        if comm.rank > 0:
            config.pluginmanager.unregister(name="terminalreporter")

    def print_lines(self, *texts):
        """Write lines, each with this rank's name before it, at once and past pytest's capture."""
        lines = [line for text in texts for line in text.rstrip().splitlines()]
        self.stderr.write("".join(f"[rank {self.comm.rank} of {self.comm.size}] {line}\n" for line in lines))
        self.stderr.flush()

    def pytest_collectreport(self, report):
        """Show what could not be imported on another rank than 0."""
        if report.failed and self.comm.rank > 0:
            self.print_lines(f"{report.nodeid} cannot be collected", report.longreprtext)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session):
        """Stop all ranks unless they collected the same tests without an error. Collective."""
        from hpcmoe.wait import gather_to_all

        collected = [item.nodeid for item in session.items]
        errors, collections = zip(*gather_to_all(self.comm, (session.testsfailed, collected)), strict=True)
        if any(errors) and not session.testsfailed:
            pytest.exit("another rank could not collect the tests", returncode=2)
        if not any(errors) and any(other != collected for other in collections):
            pytest.exit("the ranks collected different tests", returncode=2)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        """Give a test its time and no more, be it stuck in Python, in MPI or in a library: mpi(seconds=...)."""
        mark = item.get_closest_marker("mpi")
        seconds = mark.kwargs.get("seconds", TEST_SECONDS) if mark else TEST_SECONDS
        watch = threading.Timer(seconds, self.abort_all, [item.nodeid, seconds])
        watch.daemon = True
        watch.start()
        faulthandler.dump_traceback_later(seconds + EXIT_BARRIER_SECONDS, exit=True, file=self.stderr)  # needs no GIL
        try:
            return (yield)
        finally:
            watch.cancel()
            faulthandler.cancel_dump_traceback_later()

    def abort_all(self, test, seconds):
        """Print where this rank is, and abort all ranks."""
        stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
        own = [entry for entry in stack if "/_pytest/" not in entry and "/pluggy/" not in entry]
        self.print_lines(f"{test} has not ended after {seconds:.0f} s; this rank is here:", *own)
        time.sleep(1.0)  # the other ranks print where they are
        self.comm.Abort(1)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item):
        """Have set-up, test and tear-down each end alike on all ranks."""
        report = yield
        if item.get_closest_marker("mpi") is not None:
            self.share_outcome(report)
        return report

    def share_outcome(self, report):
        """Make this rank's report as bad as the worst. Collective; aborts all when a failure cannot be shared."""
        from hpcmoe.errors import abort_ranks
        from hpcmoe.wait import wait_all

        # Print before waiting: the others may be in a collective call that this rank never joins.
        own = OUTCOMES.index(report.outcome)
        captured = [text for _, text in report.sections]
        lines = [f"{report.nodeid} failed ({report.when})", report.longreprtext, *captured]
        if report.failed and self.comm.rank > 0:
            self.print_lines(*lines)

        outcomes = bytearray(self.comm.size)
        gathered = self.comm.Iallgather(bytes([own]), outcomes)
        if not wait_all([gathered], EXIT_BARRIER_SECONDS if report.failed else None):
            self.print_lines(*(lines if self.comm.rank == 0 else ()), "the other ranks do not follow: all are aborted")
            abort_ranks(self.comm, 1)

        worst = max(outcomes)
        if worst > own:
            ranks = ", ".join(str(rank) for rank, outcome in enumerate(outcomes) if outcome == worst)
            reason = f"{OUTCOMES[worst]} on rank {ranks} of {self.comm.size}"
            report.outcome = OUTCOMES[worst]
            report.longrepr = reason if report.failed else (str(report.fspath), report.location[1], reason)

    def pytest_unconfigure(self):
        """Let rank 0's last lines out: mpirun ends the job at the first exit that is not 0. Collective."""
        from hpcmoe.wait import barrier

        sys.stdout.flush()
        if not barrier(self.comm, EXIT_BARRIER_SECONDS):
            self.comm.Abort(1)
