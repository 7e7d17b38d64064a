"""The chapter's README names the files, keys and seconds that the code has."""

import re

from launch import ROOT

from hpcmoe.config import Config
from hpcmoe.write import checksums, folder, lock, pieces

README = (ROOT / "hpcmoe/write/README.md").read_text()


def test_it_names_the_files_of_a_run():
    listed = re.findall(r"^out/run/([\w.-]+)", README, re.MULTILINE)
    assert len(listed) == 5 and all(folder.has_run_name(name.replace("STEP", "1")) for name in listed)
    names = (checksums.CHECKSUMS, lock.LOCK, pieces.MASTER, pieces.METADATA, folder.MARK)
    assert [name for name in names if name not in README] == []


def test_it_names_the_seconds_of_the_lock():
    assert f"{lock.STALE_SECONDS:.0f} s after its last heartbeat, one every {lock.HEARTBEAT_SECONDS:.0f} s" in README


def test_keys_it_names_exist():
    assert {"asynchronous", "activations_of_layers"} <= Config().write.__dataclass_fields__.keys()
