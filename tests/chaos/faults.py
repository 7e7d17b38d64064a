"""The kinds of faults: what is done to a run, how it must end, and what must be put back before it goes on."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
from launch import run

ASKED, REFUSED = 75, 2  # statuses: ended in order; one line
PAUSE_SECONDS = 1.5
HANG_SECONDS = 10.0  # after which a stopped rank is to be named


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of fault."""

    act: Callable  # (case): do it
    check: Callable  # (case, ended) -> what is wrong with the end, lines
    restore: Callable = lambda case: None  # put back what the fault took
    any_time: bool = True  # False: only once there is a checkpoint
    removes: bool = False  # True: the checkpoints go with it
    supervised: bool = False  # True: under `hpcmoe run --restart`
    settings: dict = field(default_factory=dict)  # beside case.SETTINGS


def list_ranks(case):
    """List the processes of the ranks as {rank: process}; MPI's rank 0 is never this driver."""
    found = {}
    for process in case.faulted.processes():
        try:
            environment = process.environ()
            rank = environment.get("PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK"))
            if rank is not None and not any("watcher.py" in word for word in process.cmdline()):
                found[int(rank)] = process
        except psutil.Error:
            continue
    return found


def choose_rank(case):
    """Choose one of the ranks that have started -> (its number, its process)."""
    deadline = time.monotonic() + 60
    while not (found := list_ranks(case)):
        assert time.monotonic() < deadline, "no rank has started"
        time.sleep(0.01)
    return case.chosen.choice(sorted(found.items()))


def send(case, process, number, whom):
    """Send a process a signal, and note it."""
    case.what = f"{signal.Signals(number).name} to {whom}, process {process.pid}, after step {case.before}"
    process.send_signal(number)


def kill_rank(case):
    """Kill a rank."""
    rank, process = choose_rank(case)
    case.named = f"[rank {rank} of {case.ranks}, "
    send(case, process, signal.SIGKILL, f"rank {rank}")


def check_killed(case, ended):
    """No other rank than the killed one is named, and it is once there are steps: before MPI starts nobody watches."""
    wrong = check_ended(case, ended)
    own = [line for line in ended.errors.splitlines() if "ended before its time" in line]
    if not all(line.startswith(case.named) for line in own) or (case.before and not own):
        wrong.append(f"does not name {case.named}: {ended}")
    return wrong


def kill_launcher(case):
    """Kill mpirun or its proxy."""
    launcher = psutil.Process(case.faulted.process.pid)
    proxies = [p for p in launcher.children() if "proxy" in p.name()]
    victim = case.chosen.choice([launcher, *proxies])
    send(case, victim, signal.SIGKILL, victim.name())


def check_ended(case, ended):
    """The run ended, and not as if it were done."""
    return [] if ended.status != 0 else [f"status 0: {ended}"]


def pause_rank(case):
    """Stop a rank for a moment."""
    rank, process = choose_rank(case)
    send(case, process, signal.SIGSTOP, f"rank {rank}")
    time.sleep(PAUSE_SECONDS)
    process.send_signal(signal.SIGCONT)


def stop_rank(case):
    """Stop a rank for good."""
    rank, process = choose_rank(case)
    case.named = f"rank {rank} of {case.ranks}"
    send(case, process, signal.SIGSTOP, f"rank {rank}")


def check_hung(case, ended):
    """The run ended, and named the rank that was stopped."""
    wrong = check_ended(case, ended)
    return wrong if case.named in ended.errors else [*wrong, f"does not name {case.named}: {ended}"]


def check_done(case, ended):
    """The run went on to its end by itself."""
    return [] if ended.status == 0 else [f"did not go on: {ended}"]


def send_signal(case):
    """Ask a rank, the launcher or all processes to end."""
    number = case.chosen.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    match case.chosen.choice(["rank", "launcher", "group"]):
        case "rank":
            rank, process = choose_rank(case)
            send(case, process, number, f"rank {rank}")
        case "launcher":
            send(case, psutil.Process(case.faulted.process.pid), number, "launcher")
        case "group":
            case.what = f"{number.name} to the group, after step {case.before}"
            os.killpg(case.faulted.process.pid, number)


def check_asked(case, ended):
    """The run ended in order, if it had begun to train, or else at once by the signal."""
    allowed = {ASKED} if case.before else {ASKED, *(128 + n for n in (2, 10, 15)), *(-n for n in (2, 10, 15))}
    return [] if ended.status in allowed else [f"status {ended.status}, not of {sorted(allowed)}: {ended}"]


def fill_disk(case):
    """Let no file of a rank grow beyond a few bytes."""
    rank, process = choose_rank(case)
    case.what = f"rank {rank}'s files may not grow, after step {case.before}"
    process.rlimit(psutil.RLIMIT_FSIZE, (2048, 2048))


def check_line(case, ended):
    """The run ended with one line, of all ranks or of the one that failed alone."""
    wrong = [] if ended.status == REFUSED else [f"status {ended.status}: {ended}"]
    own = [*ended.lines("hpcmoe:"), *ended.lines("[rank ")]
    return wrong if len(own) == 1 else [*wrong, f"not one line: {ended}"]


def move_folder(case):
    """Move or remove the run's folder."""
    removed = case.chosen.random() < 0.5
    case.what = f"folder {'removed' if removed else 'moved'}, after step {case.before}"
    case.run_folder.rename(case.folder / "elsewhere")
    if removed:
        shutil.rmtree(case.folder / "elsewhere", ignore_errors=True)


def move_back(case):
    """Put the folder back where it was, and what the run left there away."""
    if (case.folder / "elsewhere").exists():
        shutil.rmtree(case.run_folder, ignore_errors=True)
        (case.folder / "elsewhere").rename(case.run_folder)


def check_folder(case, ended):
    """The run ended with one line that names the folder."""
    return check_line(case, ended) or ([] if str(case.run_folder) in ended.errors else [f"no name: {ended}"])


def damage_newest(case):
    """Kill a rank; a byte of the newest checkpoint changes afterwards."""
    kill_rank(case)
    case.faulted.process.wait(60)
    newest = max(case.run_folder.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.partition("-")[2]))
    path = case.chosen.choice([each for each in sorted(newest.iterdir()) if each.stat().st_size])
    content = bytearray(path.read_bytes())
    content[case.chosen.randrange(len(content))] ^= 1 << case.chosen.randrange(8)
    path.write_bytes(content)
    case.what += f", {newest.name}/{path.name} damaged"


def start_second(case):
    """Start another run of the same name."""
    case.what = f"a second run, after step {case.before}"
    command = [word for word in case.spell(1) if word not in ("--resume", "auto")]
    case.second = run(*(command if case.chosen.random() < 0.5 else case.spell(1)), timeout_seconds=120)


def check_second(case, ended):
    """The second run said one line, the first went on to its end."""
    refused = case.second.status == REFUSED and "is in use by" in case.second.errors
    return check_done(case, ended) + ([] if refused else [f"the second run: {case.second}"])


KINDS = {
    "kill": Kind(act=kill_rank, check=check_killed),
    "launcher": Kind(act=kill_launcher, check=check_ended),
    "pause": Kind(act=pause_rank, check=check_done),
    "stop": Kind(act=stop_rank, check=check_hung, any_time=False, settings={"restart.hang_seconds": HANG_SECONDS}),
    "restart": Kind(act=kill_rank, check=check_done, any_time=False, supervised=True),
    "signal": Kind(act=send_signal, check=check_asked),
    "disk": Kind(act=fill_disk, check=check_line, any_time=False),
    "folder": Kind(act=move_folder, check=check_folder, restore=move_back, any_time=False, removes=True),
    "damage": Kind(act=damage_newest, check=check_ended, any_time=False),
    "second": Kind(act=start_second, check=check_second, any_time=False),
}
