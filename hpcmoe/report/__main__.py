"""Show what runs did: `python -m hpcmoe.report RUN [RUN ...]` writes RUN/report.html, and shows the same as text.

An error ends it with one line and exit status 2.
"""

if __name__ == "__main__":
    from hpcmoe.start import prepare_process

    prepare_process()

import argparse
import dataclasses
import pathlib
import shutil
import sys
import warnings
from collections.abc import Sequence

from hpcmoe.arguments import Parser, name_program, run_without_ranks
from hpcmoe.errors import CheckpointError, ConfigError, HpcmoeError
from hpcmoe.messages import one_line
from hpcmoe.output import print_to_stdout, read_stdout_encoding
from hpcmoe.placement.problem import check_problem
from hpcmoe.report.live import LivePage
from hpcmoe.report.page.assemble import assemble_report
from hpcmoe.report.page.contents import Report
from hpcmoe.report.page.html import make_page
from hpcmoe.report.page.recorded import RecordedRun
from hpcmoe.report.page.spreadsheet import list_spreadsheets
from hpcmoe.report.page.terminal import format_report
from hpcmoe.results import check_outputs, one_line_error, replace_file
from hpcmoe.write.problem import read_run_problem
from hpcmoe.write.run_file import read_run_file

PAGE, TABLES = "report.html", "report-csv"  # in the run's folder
_LEAST_WIDTH, _MOST_WIDTH = 60, 120


def main(words: Sequence[str] | None = None) -> int:
    """Run the command -> its exit status."""

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of NaN, which records may hold
            report_runs(read_report_arguments(sys.argv[1:] if words is None else words))

    return run_without_ranks(work)


def read_report_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises ConfigError; exits after --help."""
    parser = Parser(
        prog=name_program("hpcmoe.report"),
        description=f"Show what a run did, or several beside each other: writes {PAGE} into the folder of the first.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or its run.h5")
    parser.add_argument("-o", "--output", metavar="FILE.html", help=f"write the page there instead of RUN/{PAGE}")
    parser.add_argument("--csv", action="store_true", help=f"write the tables and each step's figures to RUN/{TABLES}/")
    parser.add_argument(
        "--live", action="store_true", help="serve the page on this machine alone, and follow the run; ends by Ctrl-C"
    )
    parser.add_argument("--port", type=int, default=0, help="of --live, on 127.0.0.1; 0 takes a free one (%(default)s)")
    arguments = parser.parse_args(words)
    if not 0 <= arguments.port < 2**16:
        raise ConfigError(f"--port {arguments.port}: must be from 0 to 65535")
    return arguments


def report_runs(arguments: argparse.Namespace) -> None:
    """Write or serve the report, and show it."""
    paths = [find_run_file(run, arguments.live) for run in arguments.runs]
    if arguments.live:
        serve_report(paths, arguments.port)
        return
    folder = paths[0].parent
    page = arguments.output or str(folder / PAGE)
    check_outputs({"a run's record": str(paths[0])}, {"the page": page})
    runs = read_runs(paths)
    report = assemble_report(runs)
    written = [page]
    with replace_file(page) as part:
        part.write_text(make_page(report), encoding="utf-8", errors="replace")
    if arguments.csv:
        written.append(f"{write_spreadsheets(report, runs, folder / TABLES)}/")
    width = min(max(shutil.get_terminal_size((100, 24)).columns, _LEAST_WIDTH), _MOST_WIDTH)
    print_to_stdout(format_report(report, width, read_stdout_encoding()))
    print_to_stdout(f"\nwritten: {', '.join(written)}")


def find_run_file(run: str, may_come: bool) -> pathlib.Path:
    """Find the record of a run by its folder or its own path; may_come: the folder is enough. Raises ConfigError."""
    path = pathlib.Path(run)
    try:
        is_folder = path.is_dir()
        path = path / "run.h5" if is_folder else path
        exists = path.is_file() or (is_folder and may_come)
    except (OSError, ValueError) as error:  # a name too long, a NUL
        raise ConfigError(f"{one_line(run)}: cannot be read: {one_line(error)}") from None
    if not exists:
        raise ConfigError(f"{one_line(path)}: is missing; RUN must be the folder of a run, or its run.h5")
    return path


def read_runs(paths: Sequence[pathlib.Path]) -> list[RecordedRun]:
    """Read the records of runs, which have names of their own. Raises HpcmoeError in one line."""
    names = [path.resolve().parent.name or "run" for path in paths]
    if len(set(names)) < len(names):
        names = ["/".join(path.resolve().parts[-3:-1]) for path in paths]
    names = [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]
    runs = [read_run(path, one_line(name)) for path, name in zip(paths, names, strict=True)]
    for run in runs:
        if run.num_steps == 0:
            raise CheckpointError(f"{run.path}: the run took no step: there is nothing to report; --live waits for it")
    return runs


def read_run(path: pathlib.Path, name: str) -> RecordedRun:
    """Read the record of a run, with its problem where it has one that holds."""
    metrics, values = read_run_file(path)
    try:
        problem, _ = read_run_problem(path)
        check_problem(problem)
        problem = dataclasses.replace(problem, node_names=tuple(map(one_line, problem.node_names)))
    except (HpcmoeError, ValueError, TypeError, LookupError, MemoryError, AttributeError):  # there is none, or damaged
        problem = None
    return RecordedRun(name=name, path=one_line(path), metrics=metrics, values=values, problem=problem)


def write_spreadsheets(report: Report, runs: Sequence[RecordedRun], folder: pathlib.Path) -> pathlib.Path:
    """Write the tables into a folder -> the folder."""
    with one_line_error(folder):
        folder.mkdir(exist_ok=True)
        for name, text in list_spreadsheets(report, runs):
            with replace_file(folder / name) as part:
                part.write_text(text, encoding="utf-8", errors="replace")
    return folder


def serve_report(paths: Sequence[pathlib.Path], port: int) -> None:
    """Run the server of the page until Ctrl-C."""
    try:
        server = LivePage(lambda: find_state(paths), lambda: make_live_page(paths), port)
    except OSError as error:
        raise ConfigError(f"--port {port}: cannot be served: {error.strerror}") from None
    with server:
        print_to_stdout(f"{server.url}: follows {', '.join(map(one_line, paths))}; Ctrl-C ends it")
        server.serve_forever()


def find_state(paths: Sequence[pathlib.Path]) -> str:
    """Return what changes whenever a record is replaced."""
    try:
        return " ".join(f"{status.st_ino}-{status.st_mtime_ns}" for status in (path.stat() for path in paths))
    except OSError:
        return "missing"


def make_live_page(paths: Sequence[pathlib.Path]) -> str:
    """Make the page that follows runs; where there is nothing to show yet, one that says why."""
    try:
        report = assemble_report(read_runs(paths))
    except HpcmoeError as error:
        report = Report(title="Waiting for the run", subtitle=str(error).splitlines()[0], headlines=(), sections=())
    return make_page(report, follows=True)


if __name__ == "__main__":
    sys.exit(main())
