"""Work that no sampling waits for: once a model, and none is cut off when ComfyUI ends."""

from __future__ import annotations

import threading

import pytest
from hswq.loader.store import later

MODEL = "ab" * 32


@pytest.fixture(autouse=True)
def begun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(later, "_ending", threading.Event())
    yield
    later.end()
    assert not later._threads


def test_is_waited_for():
    may_end, done = threading.Event(), []
    later.do_later(MODEL, lambda: (may_end.wait(), done.append(MODEL)))
    may_end.set()
    later.wait_for(MODEL)
    assert done == [MODEL]
    later.wait_for("of a model without any")


def test_is_done_once_at_a_time():
    may_end, done = threading.Event(), []

    def work() -> None:
        may_end.wait()
        later.wait_for(MODEL)  # not for itself
        done.append(MODEL)

    for _ in range(3):
        later.do_later(MODEL, work)
    may_end.set()
    later.wait_for(MODEL)
    later.do_later(MODEL, work)
    later.wait_for(MODEL)
    assert done == [MODEL] * 2


def test_ends_with_comfyui_between_its_parts():
    begun, parts = threading.Event(), []

    def work() -> None:
        while True:
            later.go_on()
            parts.append(1)
            begun.set()

    later.do_later(MODEL, work)
    begun.wait()
    later.end()
    done = len(parts)
    later.do_later(MODEL, work)
    later.go_on()  # raises in such a thread alone
    assert len(parts) == done


def test_an_error_ends_it(monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", lambda found: raised.append(found.exc_type))
    later.do_later(MODEL, lambda: 1 / 0)
    later.wait_for(MODEL)
    assert raised == [ZeroDivisionError]
    assert not later._threads
