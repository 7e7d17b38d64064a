"""Plants each fault in a copy of the checkout and runs the tests that must catch it: `python -m faults [WORD ...]`.

With words, only the faults whose names hold one. Ends 1 where a fault is not caught or cannot be planted, or where the
tests fail without it.
"""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from faults.plants import FAULTS
from launch import MPIRUN, ROOT

TRIAL_SECONDS = 600.0  # after which a fault has made the tests hang; that is caught too
PASSED = 0  # pytest's status


def copy_checkout(folder):
    """Copy what git knows, and what numba has compiled of it, times and all."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "hpcmoe/placement/search/__pycache__").glob("*.nb*")]
    for name in filter(None, [*names, *compiled]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def run_tests(folder, tests, ranks):
    """Run tests in a copy -> pytest's status, or None when they hang or a rank is gone."""
    mpi = ("--with-mpi", "-m", "mpi") if ranks else ("-m", "not mpi")
    launch = (MPIRUN, "-n", str(ranks)) if ranks else ()
    command = [*launch, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mpi, *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
        try:
            return process.wait(TRIAL_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return None


def try_fault(folder, fault, passes):
    """Plant a fault, run its tests and take it out again -> what came of it; passes(tests, ranks): without it."""
    path = folder / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        return f"CANNOT BE PLANTED: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}"
    if not passes(fault.tests, fault.ranks):
        return f"FAILS WITHOUT IT: {' '.join(fault.tests)}"
    path.write_text(text.replace(fault.old, fault.new))
    try:
        status = run_tests(folder, fault.tests, fault.ranks)
    finally:
        path.write_text(text)
    return "NOT CAUGHT" if status == PASSED else "caught"


def main(*words):
    """Try the faults one after the other -> exit status."""
    chosen = {name: fault for name, fault in FAULTS.items() if not words or any(word in name for word in words)}
    with tempfile.TemporaryDirectory(prefix="hpcmoe-faults-") as scratch:
        folder = pathlib.Path(scratch)
        copy_checkout(folder)
        passes = functools.cache(lambda tests, ranks: run_tests(folder, tests, ranks) == PASSED)
        found = {}
        for number, (name, fault) in enumerate(chosen.items(), 1):
            found[name] = try_fault(folder, fault, passes)
            print(f"{number:3} of {len(chosen)}  {found[name]}: {name} ({fault.file})", flush=True)
    caught = sum(what == "caught" for what in found.values())
    print(f"{caught} of {len(found)} faults caught")
    return 0 if found and caught == len(found) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
