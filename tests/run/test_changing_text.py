"""Text that changes under a run ends all ranks in order, with one line, whichever rank reads it."""

import os
import sys
import time

from launch import HANG_SECONDS, MPIRUN, Running

SETTINGS = {
    "run.output": "$HERE/out", "data.files": '["$HERE/*.txt"]', "run.steps": 1000000, "model.sequence_length": 32,
    "data.batch_sequences": 16, "data.validation_sequences": 16, "write.checkpoint_every": 2, "train.validate_every": 0,
}  # fmt: skip


def test_a_file_that_is_emptied_under_a_run_is_one_line_and_status_2(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(path, "wb") as file:
        file.write(b"some words that are to be learned, again and again.\n" * 1000)
    overrides = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    command = [MPIRUN, "-n", 2, sys.executable, "-m", "hpcmoe.main", "inputs/run.toml", *overrides]
    running = Running(*command, HERE=str(tmp_path))
    try:
        deadline = time.monotonic() + HANG_SECONDS
        while not list(tmp_path.glob("out/run/checkpoint-*/master.h5")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.truncate(path, 0)
        ended = running.wait(60)
    finally:
        running.kill()
    said = rf"[data] files: {tmp_path}/\udcff.txt: has 0 bytes, had 52000 when the run began"
    assert ended.status == 2 and "Traceback" not in ended.errors, ended
    assert [line.partition("] ")[2] for line in ended.lines("hpcmoe:")] == [said], ended
    assert list(tmp_path.glob("out/run/run.h5")) and not list(tmp_path.glob("out/run/*.partial")), ended
