"""Ranks on four shaped hosts in two racks, made on this machine."""

import json
import os
import sys

from lab.machines import LAB, racks
from launch import MPIRUN, ROOT, run

LIMIT_SECONDS = 600.0
QUEUE = "300ms"  # of its rate: the uplink holds 7.5 MB, as a rack's switch does; with less, lost packets tell the time
SEND_BUFFER = "16k"  # of a connection, where many share the uplink


def run_on_hosts(module, folder, ranks_a_host, *arguments, send_buffer=SEND_BUFFER, **shape):
    """Run a module of this folder over the hosts -> what it wrote as JSON. Skips, with the reason, where none can be.

    The module's first argument is the file to write; shape goes to the hosts' script.
    """
    path = folder.absolute() / f"{module}.json"
    path.unlink(missing_ok=True)
    with racks(QUEUE=QUEUE, **shape) as hosts:
        where = ["-hosts", ",".join(f"{host}:{ranks_a_host}" for host in hosts), "-n", ranks_a_host * len(hosts)]
        mpirun = [MPIRUN, "-launcher", "rsh", "-launcher-exec", LAB / "agent", *where]
        worker = [sys.executable, "-m", f"bench.{module}", path, *arguments]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        ended = run(
            LAB / "on", hosts[0], *mpirun, *worker,
            timeout_seconds=LIMIT_SECONDS, UCX_TLS="tcp,self", UCX_TCP_SNDBUF=send_buffer, PYTHONPATH=paths,
        )  # fmt: skip
    assert ended.status == 0, ended
    return json.loads(path.read_text())
