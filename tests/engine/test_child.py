"""Work in a process that may hang, grow or die: the caller gets a reason, and goes on."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from fwdllm.engine.child import Child, ChildError

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
MEMORY = 200 << 20


@pytest.fixture(params=[False, True], ids=["one process", "a process each"])
def child(request: pytest.FixtureRequest) -> Child:
    return Child("child_targets:do", forks=request.param)


def reason_of(child: Child, request: str, seconds: float = 5.0) -> str:
    with pytest.raises(ChildError) as caught:
        child.ask(request, seconds, MEMORY)
    return str(caught.value)


def test_answers_are_whole() -> None:
    child = Child("child_targets:echo")
    odd = ["é\ud800\n\x00中", {"a": [1.5, None, True]}, "x" * (1 << 20)]
    for request in odd:
        assert child.ask(request, 5) == request


def test_every_end_has_a_reason_and_the_next_request_an_answer(child: Child) -> None:
    assert reason_of(child, "segfault").startswith("it ends with Segmentation fault")
    assert reason_of(child, "abort") == "it ends with Aborted: file.c:7: it is odd"
    assert reason_of(child, "raise") == "the reason"
    assert child.ask("print", 5) == "print"
    assert child.ask("hello", 5) == "hello"


def test_computing_and_waiting_without_end_are_ended(child: Child) -> None:
    child.ask("hello", 5)
    start = time.monotonic()
    assert reason_of(child, "loop", 1) == "it computes without end"
    assert reason_of(child, "sleep", 0.2) == "it has not ended after 1 s"
    assert time.monotonic() - start < 20
    assert child.ask("hello", 5) == "hello"


@needs_linux
def test_memory_is_bounded(child: Child) -> None:
    assert reason_of(child, "keep growing") == "it needs too much memory"
    assert child.ask("hello", 5) == "hello"


@needs_linux
def test_without_a_bound_it_may_grow() -> None:
    assert Child("child_targets:do").ask("grow", 5) == "grow"


def test_a_process_that_has_ended_for_want_of_work_is_started_again() -> None:
    child = Child("child_targets:do")
    for _ in range(2):
        assert child.ask("end later", 5) == "end later"
        time.sleep(0.5)
    assert child.ask("hello", 5) == "hello"


def test_one_process_serves_all_requests_of_all_threads() -> None:
    child, found = Child("child_targets:number"), set[int]()
    threads = [threading.Thread(target=lambda: found.add(child.ask(None, 5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_fork_of_the_caller_has_a_process_of_its_own() -> None:
    child = Child("child_targets:number")
    ours = child.ask(None, 5)
    if (fork := os.fork()) == 0:
        os._exit(0 if child.ask(None, 5) != ours else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0
    assert child.ask(None, 5) == ours


def test_a_function_that_does_not_exist_is_an_error_and_not_a_loop() -> None:
    with pytest.raises(ChildError, match="no_such_module"):
        Child("no_such_module:do").ask(None, 5)


def test_without_python_there_is_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(OSError, match="not Python's"):
        Child("child_targets:echo").ask(None, 5)
