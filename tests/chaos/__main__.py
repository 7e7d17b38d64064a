"""Disturb runs of the whole program at random moments and see that each goes on: `python -m chaos [--ranks 16]`.

Case N of a seed draws all its choices from that seed and N, so that `--seed S --case N` repeats it; what moment in the
run's work a time meets is the machine's. Ends 1 where something does not hold.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import h5py
from chaos.case import START_SECONDS, Case, run_case
from chaos.faults import KINDS


def main():
    """Run cases until their number or the time is over, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=600.0, help="in which the last case ends")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    asked = parser.parse_args()
    numbers = range(asked.cases) if asked.case is None else [asked.case]
    folder = Path(tempfile.mkdtemp(prefix="hpcmoe-chaos-"))
    try:
        sys.exit(bool(run_cases(asked, numbers, folder)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_cases(asked, numbers, folder):
    """Run cases -> the numbers of those that failed."""
    begun, slowest, done, failed = time.monotonic(), 0.0, [], []
    losses = run_undisturbed(asked, folder)
    for number in numbers:
        started = time.monotonic()
        if started - begun + slowest > asked.seconds:
            break
        case = make_case(asked, number, folder / str(number))
        wrong = run_case(case, losses)
        slowest = max(slowest, time.monotonic() - started)
        done.append(case)
        print(f"{number} {case.kind}: {case.what}: {'FAILED' if wrong else f'{case.seconds:.1f} s'}", flush=True)
        if wrong:
            failed.append(number)
            again = f"--seed {asked.seed} --ranks {asked.ranks} --case {number} --kinds {' '.join(asked.kinds)}"
            print(*wrong, f"again: PYTHONPATH=tests python -m chaos {again}", sep="\n", flush=True)
        shutil.rmtree(case.folder, ignore_errors=True)
    print_table(asked, done, failed)
    return failed


def make_case(asked, number, folder):
    """Make a case of its number; the kinds take turns."""
    folder.mkdir()
    chosen, kind = random.Random(f"{asked.seed} {number}"), asked.kinds[number % len(asked.kinds)]
    return Case(number=number, ranks=asked.ranks, kind=kind, folder=folder, chosen=chosen)


def run_undisturbed(asked, folder):
    """Run without a fault -> the losses of its steps."""
    case = make_case(asked, 0, folder / "undisturbed")
    ended = case.start(asked.ranks).wait(START_SECONDS)
    assert ended.status == 0, ended
    with h5py.File(case.run_folder / "run.h5") as file:
        return file["train/loss/value"][:]


def print_table(asked, done, failed):
    """Print what was done, by kind."""
    by_kind = defaultdict(list)
    for case in done:
        by_kind[case.kind].append(case)
    print(f"\nseed {asked.seed}, {asked.ranks} ranks: {len(done)} faults, {len(failed)} failed\n")
    print("| kind | faults | failed | slowest end, s | steps redone, mean | most |\n|---|---|---|---|---|---|")
    for kind, cases in by_kind.items():
        redone, slowest = [case.redone for case in cases], max(case.seconds for case in cases)
        bad = sum(case.number in failed for case in cases)
        print(f"| {kind} | {len(cases)} | {bad} | {slowest:.1f} | {sum(redone) / len(redone):.1f} | {max(redone)} |")


if __name__ == "__main__":
    main()
