"""The report as a command: what it writes and shows, what it refuses in one line, how it follows a run."""

import contextlib
import csv
import io
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import h5py
import numpy as np
import pytest
from launch import ROOT, run
from made_records import make_record, write_metric

from hpcmoe.report.__main__ import main
from hpcmoe.write.folder import has_run_name, is_written_by_run


def show(*words):
    """Run the command in this process -> (status, its output, lines of standard error)."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main([str(word) for word in words])
    return status, out.getvalue(), errors.getvalue().splitlines()


@pytest.fixture
def made(tmp_path):
    """The folder of a run."""
    (tmp_path / "made").mkdir()
    make_record(tmp_path / "made" / "run.h5")
    return tmp_path / "made"


def test_one_file_holds_all_and_asks_for_nothing(made):
    status, text, errors = show(made)
    page = (made / "report.html").read_text()
    assert (status, errors) == (0, []) and f"written: {made / 'report.html'}" in text
    assert re.findall(r'(?:src|href)="(?!#|data:,)[^"]*"|url\(|@import|<script', page) == []
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    for figure in (
        "12.3k",
        "2.5000",
        "Loss",
        "Before and after moves",
        "sampling floor 0.1",
        "lower bound 1",
        "node001",
    ):
        assert figure in page
    assert has_run_name("report.html") and is_written_by_run(made / "report.html")


def test_figures_are_those_of_the_record(made, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # no line is wrapped
    with h5py.File(made / "run.h5") as file:
        seconds, load = file["run/seconds/value"][:], file["experts/utilisation/value"][:]
    _, text, _ = show(made)
    mean = load.mean(axis=0)
    layer, expert = np.unravel_index(mean.argmax(), mean.shape)
    assert f"{1e3 * seconds.mean():.2f}" in text and f"expert {expert} of layer {layer}" in text


@pytest.mark.parametrize(("columns", "encoding"), [(80, "utf-8"), (110, "utf-8"), (200, "ascii")])
def test_the_terminal_shows_it_in_its_width_and_letters(made, columns, encoding):
    words = [sys.executable, "-m", "hpcmoe", "report", str(made)]
    ended = run(*words, COLUMNS=str(columns), PYTHONIOENCODING=encoding, PYTHONPATH=str(ROOT))
    lines = ended.output.splitlines()
    assert ended.status == 0 and max(map(len, lines[:-1])) <= min(columns, 120) and "Expert load" in lines
    assert ended.output.isascii() == (encoding == "ascii") and "\\u" not in ended.output


def test_csv_has_every_step_and_no_formula(made):
    with h5py.File(made / "run.h5", "r+") as file:
        del file["run/versions"]
        file["run/versions"] = [["=1+1", "@x"]]
    assert show(made, "--csv")[0] == 0
    with (made / "report-csv" / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    with h5py.File(made / "run.h5") as file:
        losses = dict(zip(file["train/loss/step"][:].tolist(), file["train/loss/value"][:].tolist(), strict=True))
    found = {int(row["step"]): float(row["train/loss (nats/byte)"]) for row in rows if row["train/loss (nats/byte)"]}
    assert found == pytest.approx(losses) and rows[0]["step"] == "0"
    assert "'=1+1,'@x" in (made / "report-csv" / "versions.csv").read_text()
    assert {path.stem for path in (made / "report-csv").iterdir()} >= {"layers", "stages", "links", "moves", "memory"}


def test_runs_beside_each_other_show_what_differs_and_ratios(tmp_path):
    for name, rate, top_k in (("a", 100.0, 1), ("b", 250.0, 2)):
        (tmp_path / name).mkdir()
        config = f"[run]\nsteps = 9\n# --set model.top_k={top_k}"
        versions = [["numpy", f"2.{top_k}"], ["python", "3.11"]]
        values = {"run__tokens_per_second_overall": rate, "run__config": config, "run__versions": versions}
        make_record(tmp_path / name / "run.h5", nodes=top_k, **values)
    status, text, _ = show(tmp_path / "a", tmp_path / "b", "-o", tmp_path / "both.html", "--csv")
    assert status == 0 and re.search(r"tokens per second +tokens/s +100 +250 +2\.500", text)
    differences = (tmp_path / "a" / "report-csv" / "config.csv").read_text().splitlines()
    assert differences == [",a,b", "model.top_k,1,2"]
    assert (tmp_path / "a" / "report-csv" / "versions.csv").read_text().splitlines()[1:] == ["numpy,2.1,2.2"]
    page = (tmp_path / "both.html").read_text()
    assert "2 ranks, 1 node, 1 rack" in page and "a: hottest expert of each layer" in page


def test_files_of_earlier_versions_are_shown():
    status, text, errors = show(ROOT / "tests" / "old", "-o", "/dev/null")
    assert (status, errors) == (0, []) and "Throughput" in text and "What binds" in text


def spoil(path, how):
    """Spoil a record."""
    match how:
        case "cut":
            path.write_bytes(path.read_bytes()[:3000])
        case "text":
            path.write_text("no HDF5")
        case "no steps":
            with h5py.File(path, "w") as file:
                file["run/config"] = ""
        case "link":
            with h5py.File(path, "r+") as file:
                file["run/x"] = h5py.ExternalLink("/etc/passwd", "/x")
        case "lengths":
            with h5py.File(path, "r+") as file:
                del file["train/loss"]
                write_metric(file, "train/loss", [1, 2], [1.0])


@pytest.mark.parametrize("how", ["cut", "text", "no steps", "link", "lengths"])
def test_what_cannot_be_shown_is_one_line_and_status_2(made, how):
    spoil(made / "run.h5", how)
    status, text, errors = show(made)
    assert (status, text, len(errors)) == (2, "", 1) and "run.h5" in errors[0]
    assert not (made / "report.html").exists()


@pytest.mark.parametrize(
    "line",
    ["{tmp}/none", "{tmp}", "", "{made} -o {made}/run.h5", "{made} --port x", "{made} -o {made}", "{made} --port 70000",
     "x" * 5000],
)  # fmt: skip
def test_what_the_user_can_mend_is_one_line_and_status_2(made, line):
    status, _, errors = show(*line.format(tmp=made.parent, made=made).split())
    assert status == 2 and len(errors) == 1 and errors[0].startswith("hpcmoe: ")


def test_names_of_runs_and_in_records_are_text_and_nothing_else(made):
    names = ["<script>alert(1)</script>", "a\nb\x1b[2J"]
    config = "[x]\ny = '</style><img src=x>'"
    make_record(made / "run.h5", cluster__node_names=names, problem__node_names=names, run__config=config)
    status, text, _ = show(made)
    page = (made / "report.html").read_text()
    assert status == 0 and "<script" not in page and "<img" not in page and "\x1b" not in page + text
    named = made.rename(made.with_name("<img src=x>"))
    assert show(named, named)[0] == 0 and "<img" not in (named / "report.html").read_text()


DAMAGED = (
    "experts__tokens_of_node", "problem__node_of_rank", "memory__computed_bytes", "cluster__expert_of_replica",
    "comm__bytes_of_link", "problem__probability",
)  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize(
    "value",
    [None, -1.5, "word", np.full((3, 3), np.nan), np.full(4, 10**18)],
    ids=["none", "number", "word", "nan", "huge"],
)
def test_what_holds_of_a_damaged_record_is_shown(made, name, value):
    make_record(made / "run.h5", **{name: value})
    status, text, errors = show(made)
    assert (status, errors) == (0, []) and "Throughput" in text


@pytest.mark.full
def test_a_record_of_thousands_of_ranks_stays_a_small_page(tmp_path):
    make_record(tmp_path / "run.h5", layers=60, experts=256, nodes=512, ranks_per_node=8, points=40)
    assert show(tmp_path)[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 2_000_000 and "in 48 groups of neighbours" in page and "Of 60 layers those 6" in page


def test_it_starts_neither_mpi_nor_torch(made):
    code = f"import sys; from hpcmoe.report.__main__ import main; main([{str(made)!r}]); print(*sorted(sys.modules))"
    ended = run(sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    loaded = set(ended.output.splitlines()[-1].split())
    assert ended.status == 0 and not loaded & {"mpi4py", "torch", "matplotlib", "transformers"}


def fetch(url, **headers):
    """Fetch a page -> (status, text)."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_live_follows_a_run_on_this_machine_alone_and_ends_by_ctrl_c(tmp_path):
    path = tmp_path / "run.h5"  # which a run that starts has not yet
    words = [sys.executable, "-m", "hpcmoe.report", str(tmp_path), "--live"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        url = process.stdout.readline().split()[0].removesuffix(":")
        assert url.startswith("http://127.0.0.1:")
        assert "Waiting for the run" in fetch(url)[1]
        before = fetch(f"{url}state")[1]
        with h5py.File(path, "w") as file:
            file["run/config"] = ""
        assert "took no step" in fetch(url)[1]
        make_record(tmp_path / "next.h5").replace(path)
        assert fetch(f"{url}state")[1] != before
        assert "made: " not in fetch(url)[1] and "12 steps" in fetch(url)[1]
        assert [fetch(f"{url}{name}")[0] for name in ("run.h5", "../run.h5", "state/")] == [404] * 3
        assert fetch(url, Host="evil.example")[0] == 403
        assert not (tmp_path / "report.html").exists()
    finally:
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.splitlines() == ["hpcmoe: interrupted"]
