"""What a program prints never decides how it ends: unprintable names, closed pipes and full disks do no harm."""

import io
import logging
import os
import sys

import pytest
from launch import run

from hpcmoe.output import StderrHandler, print_to_stderr, print_to_stdout

# Print as a program beginning with prepare_process, then open a file that must not take standard output's number.
PROGRAM = """
from hpcmoe.start import prepare_process
prepare_process()
import logging, os, sys
from hpcmoe.output import StderrHandler, print_to_stderr, print_to_stdout
logging.basicConfig(handlers=[StderrHandler()])
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
for _ in range(3):
    print_to_stdout("r\\u00fcn \\udcff" * 10000)
    print_to_stderr(["r\\u00fcn"])
    logging.error("r\\u00fcn")
os.write(file, b"mine")
os._exit(5) if file <= 2 else sys.exit(0)
"""


@pytest.mark.parametrize(
    "ends", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", "| true", "2>&1 | head -c1"]
)
def test_output_that_is_closed_full_or_left_is_no_error(tmp_path, ends):
    program, kept = tmp_path / "program.py", tmp_path / "kept"
    program.write_text(PROGRAM)
    command = f"'{sys.executable}' '{program}' '{kept}' {ends}; echo ${{PIPESTATUS[0]}} >'{tmp_path}/status'"
    ended = run("bash", "-c", command, PYTHONPATH=os.getcwd(), LC_ALL="C", PYTHONIOENCODING="ascii")
    assert (tmp_path / "status").read_text() == "0\n", ended
    assert kept.read_text() == "mine"
    assert "Traceback" not in ended.errors and "ignored" not in ended.errors and "Logging" not in ended.errors, ended


@pytest.mark.parametrize(
    "encoding, shown", [("ascii", r"r\xfcn \udcff"), ("latin-1", r"rün \udcff"), ("utf-8", r"rün \udcff")]
)
def test_what_an_encoding_has_not_is_escaped(monkeypatch, encoding, shown):
    for stream, write in (("stdout", print_to_stdout), ("stderr", lambda text: print_to_stderr([text]))):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(raw, encoding=encoding))
        write("rün \udcff")
        assert raw.getvalue().decode(encoding) == f"{shown}\n"


def test_a_broken_stream_takes_the_rest_to_nowhere(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print_to_stdout("lost")
        print_to_stdout("lost too")
        assert os.readlink(f"/proc/self/fd/{full.fileno()}") == os.devnull


def test_a_stream_that_is_closed_or_not_there_is_passed_over(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        print_to_stdout("lost")
        StderrHandler(stream).handle(logging.makeLogRecord({"msg": "lost"}))
        assert (sys.stdout, sys.stderr) == (stream, stream)


def test_a_log_whose_stream_breaks_goes_on_in_silence(capsys):
    with open("/dev/full", "w", buffering=1) as full:
        log = StderrHandler(full)
        for _ in range(3):
            log.handle(logging.makeLogRecord({"msg": "lost"}))
    assert capsys.readouterr().err == ""
