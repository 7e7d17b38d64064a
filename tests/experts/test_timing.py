"""The time of an expert is that of its own shapes, in whole or by a slice that takes long enough."""

import time

import numpy as np
import pytest
import torch
from small import make_config

from hpcmoe.experts import timing
from hpcmoe.experts.shapes import make_expert_shape
from hpcmoe.experts.timing import time_passes, time_row

HOST = torch.device("cpu")


def watch_passes(monkeypatch, seconds_of):
    """Have passes take seconds_of(inner, rows) -> what was asked for."""
    asked = []

    def fake(shape, inner, rows, torch_device, packed):
        asked.append((inner, rows))
        return seconds_of(inner, rows)

    monkeypatch.setattr(timing, "time_passes", fake)
    return asked


def test_a_small_expert_is_timed_whole(monkeypatch):
    asked = watch_passes(monkeypatch, lambda inner, rows: 1e-6 * rows)
    assert time_row(make_expert_shape(make_config(model__feed_forward=96).spec), 2, 30, HOST) == pytest.approx(1e-6)
    assert asked == [(48, 30)]  # a shard of two


def test_a_large_one_is_timed_by_slices_until_they_take_long_enough(monkeypatch):
    asked = watch_passes(monkeypatch, lambda inner, rows: 1e-9 * inner * rows)
    config = make_config(model__feed_forward=2**20)
    assert time_row(make_expert_shape(config.spec), 1, 10**6, HOST) == pytest.approx(1e-9 * 2**20)
    assert asked == [(256, 512), (1024, 512), (4096, 512)]  # 2.1 ms


def test_no_rows_are_timed_as_one(monkeypatch):
    asked = watch_passes(monkeypatch, lambda inner, rows: 1.0)
    time_row(make_expert_shape(make_config().spec), 1, 0, HOST)
    assert asked[0][1] == 1


@pytest.mark.parametrize("kind", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_is_an_experts_forward_pass(kind, dtype, monkeypatch):
    """Also where hidden equals feed_forward, and with one matrix sliced by rows and the other by columns."""
    seen = []
    forward = timing.Expert.forward
    monkeypatch.setattr(timing.Expert, "forward", lambda expert, x: seen.append((expert, x)) or forward(expert, x))
    config = make_config(experts__kind=kind, model__dtype=dtype, model__hidden=12, model__feed_forward=12)
    assert 0 < time_passes(make_expert_shape(config.spec), 5, 7, HOST) < 1
    expert, x = seen[0]
    assert len(seen) == 4 and x.shape == (7, 12) and x.dtype == getattr(torch, dtype)
    assert expert.up.shape == (5, 12) and expert.down.shape == (12, 5) and expert.up.dtype == x.dtype
    assert hasattr(expert, "gate") == (kind == "swiglu")


def test_eight_times_the_width_takes_about_eight_times_as_long(monkeypatch):
    """Measured in this thread's processor seconds, for others use the machine too."""
    monkeypatch.setattr(timing.time, "perf_counter", time.thread_time)
    config = make_config(model__hidden=256, model__feed_forward=4096)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tries = [[time_passes(make_expert_shape(config.spec), inner, 256, HOST) for inner in (512, 4096)] for _ in range(7)]
    torch.set_num_threads(threads)
    narrow, wide = np.min(tries, axis=0)
    assert 3 < wide / narrow < 30
