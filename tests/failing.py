"""A group of which one rank goes wrong, each of several ways: `mpirun -n 3 python failing.py WAY ...`.

Each rank prints a line about how each way has ended, and after how long; then all try the next, in a new group. A way
that is named alone, with "alone" behind it, is caught by nobody.
"""

import faulthandler
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time

import torch
from mpi4py import MPI

import hpcmoe

H, F, E = 8, 12, 4
WORLD = MPI.COMM_WORLD
LAST = WORLD.size - 1  # the rank that goes wrong
WRONG = WORLD.rank == LAST
HANG_SECONDS = 20.0


class Raises(torch.autograd.Function):
    """Passes on; raises in the forward pass, or in the backward pass."""

    @staticmethod
    def forward(ctx, x, when):
        ctx.when = when
        if when == "forward":
            raise ZeroDivisionError("a user's own error")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.when == "backward":
            raise ZeroDivisionError("a user's own error")
        return grad, None


def make_model(group, **arguments):
    """Build two layers of experts and a MoE, as a model without a forward."""
    layers = [hpcmoe.Experts(H, F, E, group=group, top_k=3, **arguments) for _ in range(2)]
    return torch.nn.ModuleList([*layers, hpcmoe.MoE(H, F, E, group=group, aux_loss_weight=0.1)])


def forward(model, tokens=5, top_k=2, order=(0, 1, 2), when=""):
    """Compute a loss."""
    x = torch.randn(tokens, H, requires_grad=True)
    choices, gates = torch.rand(tokens, E).argsort(1)[:, :top_k], torch.rand(tokens, top_k)
    for number in order:
        y = model[number](x) if number == 2 else model[number](x, choices, gates)
        x = Raises.apply(x + y, when if number == 1 else "")
    return x.square().sum()


def train(group, model, **wrong):
    """Take one step, in plain calls."""
    forward(model, **(wrong if WRONG else {})).backward()
    group.sum_gradients(model)


def train_in_lanes(group, model, schedule="overlap", count=4, **wrong):
    """Take one step in lanes; the third micro-batch of the wrong rank is wrong."""

    def step(number):
        loss = forward(model, **(wrong if WRONG and number == 2 else {}))
        loss.backward()
        return loss.item()

    list(group.lanes(step, range(count), schedule=schedule))
    group.sum_gradients(model)


def in_group(ways, **options):
    """Return a way: train once as one should, then as `ways` says."""

    def way():
        with hpcmoe.open(WORLD, **options) as group:
            model = make_model(group)
            train(group, model)
            ways(group, model)

    return way


def interrupt(group, model, is_wrong):
    """Train for ever; soon some ranks get a signal."""
    if is_wrong:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        train(group, model)


def interrupt_in_lanes(group, model, schedule):
    """Train for ever in lanes; soon one rank gets a signal."""
    if WRONG:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        train_in_lanes(group, model, schedule)


def kill(group, model):
    """Train for ever; soon one rank is killed."""
    if WRONG:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        train_in_lanes(group, model)


def skip_backward(group, model):
    """Call the model twice, one rank without a backward pass between."""
    loss = forward(model)
    if not WRONG:
        loss.backward()
    train(group, model)


def do_if_wrong(act):
    """Return a way: one rank alone does something collective, the others train."""

    def way(group, model):
        if WRONG:
            act(group, model)
        train(group, model)

    return way


def leave_early(group, model):
    """Leave the group without an error, one rank a step before the others."""
    if not WRONG:
        train(group, model)


def mismatch(**arguments):
    """Return a way: one rank builds another layer."""

    def way():
        with hpcmoe.open(WORLD) as group:
            make_model(group, **(arguments if WRONG else {}))

    return way


def open_otherwise():
    """Open the group with other arguments on one rank."""
    with hpcmoe.open(WORLD, max_tokens=64 + WRONG):
        pass


def build_one_more(group, model):
    """Build a layer on one rank alone."""
    if WRONG:
        hpcmoe.Experts(H, F, E, group=group)
    train(group, model)


def cast_on_one(group, model):
    """Train with parameters of another precision on one rank."""
    if WRONG:
        model.to(torch.bfloat16)
    model.zero_grad()
    train(group, model)


def save_on_one(group, model):
    """Save on one rank alone."""
    group.save(pathlib.Path(tempfile.gettempdir()) / f"hpcmoe-failing-{os.getpid()}", model)


WAYS = {
    "raise forward": in_group(lambda g, m: train(g, m, when="forward")),
    "raise backward": in_group(lambda g, m: train(g, m, when="backward")),
    "raise forward, overlap": in_group(lambda g, m: train_in_lanes(g, m, when="forward")),
    "raise backward, overlap": in_group(lambda g, m: train_in_lanes(g, m, when="backward")),
    "raise forward, arrival": in_group(lambda g, m: train_in_lanes(g, m, "arrival", when="forward")),
    "raise backward, arrival": in_group(lambda g, m: train_in_lanes(g, m, "arrival", when="backward")),
    "raise forward, serial": in_group(lambda g, m: train_in_lanes(g, m, "serial", when="forward")),
    "other layer": in_group(lambda g, m: train(g, m, order=(1, 0, 2))),
    "other layer, overlap": in_group(lambda g, m: train_in_lanes(g, m, order=(1, 0, 2))),
    "fewer layers": in_group(lambda g, m: train(g, m, order=(0, 2))),
    "fewer layers at the end": in_group(lambda g, m: train(g, m, order=(0, 1))),
    "other layer, arrival": in_group(lambda g, m: train_in_lanes(g, m, "arrival", order=(1, 0, 2))),
    "other top_k": in_group(lambda g, m: train(g, m, top_k=1)),
    "other top_k, overlap": in_group(lambda g, m: train_in_lanes(g, m, top_k=1)),
    "fewer micro-batches": in_group(lambda g, m: train_in_lanes(g, m, count=4 - WRONG)),
    "fewer micro-batches, arrival": in_group(lambda g, m: train_in_lanes(g, m, "arrival", count=4 - WRONG)),
    "more micro-batches, serial": in_group(lambda g, m: train_in_lanes(g, m, "serial", count=4 + WRONG)),
    "no backward": in_group(skip_backward),
    "leaves early": in_group(leave_early),
    "sums alone": in_group(do_if_wrong(lambda g, m: g.sum_gradients(m))),
    "loads alone": in_group(do_if_wrong(lambda g, m: g.loads())),
    "updates routers alone": in_group(do_if_wrong(lambda g, m: g.update_routers())),
    "clips alone": in_group(do_if_wrong(lambda g, m: g.clip_grad_norm_(m, 1.0))),
    "rebalances alone": in_group(do_if_wrong(lambda g, m: g.rebalance(m))),
    "saves alone": in_group(do_if_wrong(save_on_one)),
    "builds alone": in_group(build_one_more),
    "more than max_tokens": in_group(lambda g, m: train(g, m, tokens=9), max_tokens=5, refuse_more=True),
    "more than max_tokens, arrival": in_group(
        lambda g, m: train_in_lanes(g, m, "arrival", tokens=9), max_tokens=5, refuse_more=True
    ),
    "other arguments of a layer": mismatch(kind="gelu"),
    "other precision of a layer": mismatch(dtype=torch.bfloat16),
    "other arguments of a group": open_otherwise,
    "other precision": in_group(cast_on_one),
    "interrupt one": in_group(lambda g, m: interrupt(g, m, WRONG)),
    "interrupt all": in_group(lambda g, m: interrupt(g, m, True)),
    "interrupt overlap": in_group(lambda g, m: interrupt_in_lanes(g, m, "overlap")),
    "interrupt arrival": in_group(lambda g, m: interrupt_in_lanes(g, m, "arrival")),
    "kill": in_group(kill),
}


def main(names):
    """Go all the ways, or one alone."""
    if names[1:] == ["alone"]:
        WAYS[names[0]]()
        return
    for name in names or [name for name in WAYS if name != "kill"]:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        begun, text = time.monotonic(), "no error"
        try:
            WAYS[name]()
        except (Exception, KeyboardInterrupt) as error:
            text = f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
        line = f"{name} | {WORLD.rank} | {time.monotonic() - begun:.1f} | {text!r}\n"
        os.write(1, line.encode())  # at once: lines of several ranks do not mix
        faulthandler.cancel_dump_traceback_later()
        request = WORLD.Ibarrier()
        while not request.Test():
            time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1:])
