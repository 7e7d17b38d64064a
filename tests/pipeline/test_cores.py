"""A thread that is woken goes on where its waker stops, and then runs on all its cores again."""

import os
import sys
import threading

import pytest

from hpcmoe.pipeline.cores import Place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's calls")


def test_a_thread_is_left_alone_before_its_cores_are_known(monkeypatch):
    """Whoever is to wake it may come at any moment of its start."""
    place, read = Place(), os.sched_getaffinity
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: (place.call_here(), read(thread))[1])
    place.enter()
    place.call_here()
    place.release()
    monkeypatch.undo()
    assert os.sched_getaffinity(0) == place.cores


def test_a_sleeping_thread_is_called_to_one_core_and_released_to_all():
    place, turn, ready, seen = Place(), threading.Event(), threading.Event(), []

    def sleep():
        place.enter()
        ready.set()
        turn.wait()
        seen.append(os.sched_getaffinity(0))
        place.release()
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=sleep)
    thread.start()
    ready.wait()
    place.call_here()
    turn.set()
    thread.join()
    cores = os.sched_getaffinity(0)
    assert len(seen[0]) == 1 and seen[0] <= cores and seen[1] == cores


def test_a_thread_that_has_ended_is_no_error():
    place = Place()
    thread = threading.Thread(target=place.enter)
    thread.start()
    thread.join()
    place.call_here()
