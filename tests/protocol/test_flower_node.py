"""Warm nodes: the process that computes, with its node and its server, and in a federation."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("flwr")
from fwdllm.engine.engine import Engine
from fwdllm.engine.files import fingerprint
from fwdllm.engine.settings import LoRAConfig
from fwdllm.protocol import wire
from fwdllm.protocol.flower import supernode
from fwdllm.protocol.flower.messages import Saved, Settings, Task
from fwdllm.protocol.flower.node import Node, NodeConfig
from fwdllm.protocol.flower.supernode import _Node
from fwdllm.protocol.flower.worker import Answer, Worker, WorkerError
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.presets import preset
from fwdllm.protocol.records import Meta
from fwdllm.protocol.server import Server

LORA = LoRAConfig(2, 4)
CHANGES = {"per_round": 2, "perturbations": 2, "batch_size": 2, "max_tokens": 32}
ROUNDS = 4
TIMEOUT = 60.0


def run_config(model: Path) -> dict[str, Any]:
    """A run's settings as Flower gives them."""
    changes = {f"federation.{name}": value for name, value in CHANGES.items()}
    return {
        "model": str(model),
        "run-dir": "run",
        "federation.preset": "spry",
        "federation.rounds": ROUNDS,
        "lora.rank": LORA.rank,
        "lora.alpha": LORA.alpha,
        **changes,
    }


@pytest.fixture
def server(bundled: Path, tmp_path: Path) -> Iterator[Server]:
    config = preset("spry", rounds=ROUNDS, **CHANGES)
    adapter = Engine.load(bundled, LORA, seed=config.seed).adapter
    assert adapter is not None
    meta = Meta.of(config, adapter, config.seed, fingerprint(bundled), 1)
    with Ledger.create(tmp_path / "ledger.sqlite", meta) as ledger:
        yield Server(ledger)


@pytest.fixture
def lines(bundled: Path) -> list[str]:
    return (bundled.parent / "pirate.train.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def data(lines: list[str], tmp_path: Path) -> list[Path]:
    """Two nodes' files."""
    paths = [tmp_path / "data-0.jsonl", tmp_path / "data-1.jsonl"]
    for i, path in enumerate(paths):
        write(path, lines[i:20:2])
    return paths


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Makes workers that end with the test."""
    made: list[Worker] = []

    def start(config: NodeConfig) -> Worker:
        made.append(Worker(config))
        return made[-1]

    yield start
    for worker in made:
        worker.end()


def write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def task_of(server: Server, assignment: Assignment) -> Task:
    return Task(
        wire.encode_assignment(assignment),
        server.synchronize(assignment.client),
        json.dumps(server.ledger.meta.model),
    )


def await_true(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def report_of(answer: Answer) -> tuple[Any, ...]:
    """What a report says, without the time it took."""
    assert answer.fault is None
    assert answer.report is not None
    report = wire.decode_report(answer.report)
    return report.n_tokens, report.loss, report.derivatives.tobytes()


def test_rounds_by_warm_processes_have_the_bits_of_new_ones(
    server: Server, bundled: Path, data: list[Path], start: Callable[..., Worker]
) -> None:
    config = run_config(bundled)
    workers = [start(NodeConfig(str(path))) for path in data]
    states = [Saved(), Saved()]
    cold_states = list(states)
    pids, first = set(), None
    while not server.done:
        for assignment in server.open_part([0, 1], 0.0):
            i, task = assignment.client, task_of(server, assignment)
            warm = workers[i].ask(config, task, states[i])
            report, cold_states[i] = Node(NodeConfig(str(data[i]))).answer(
                Settings.of(config), task, cold_states[i]
            )
            assert report_of(warm) == report_of(Answer(report))
            assert warm.saved == cold_states[i]
            states[i] = warm.saved
            first = first or (i, task, report_of(warm))
            assert warm.report is not None
            assert server.receive(i, warm.report, 0.0) is None
            pids.add(workers[i].pid)
        server.close_part(0.0)
    assert len(pids) == 2  # each worker lived from the first message to the last
    assert os.getpid() not in pids
    # Of a run that begins again, nothing is left.
    assert first is not None
    i, task, expected = first
    assert report_of(workers[i].ask(config, task, Saved())) == expected


def test_killed_worker_is_replaced_and_the_message_answered(
    server: Server, bundled: Path, data: list[Path], start: Callable[..., Worker]
) -> None:
    task = task_of(server, server.open_part([0, 1], 0.0)[0])
    worker = start(NodeConfig(str(data[0])))
    before = worker.ask(run_config(bundled), task, Saved())
    first = kill(worker)
    assert report_of(worker.ask(run_config(bundled), task, Saved())) == report_of(before)
    assert worker.pid not in (None, first)


def make_slow(data: Path) -> None:
    """Replace a file of data by a pipe, whose reader waits in the middle of a message."""
    data.unlink()
    os.mkfifo(data)


@contextmanager
def reader_waits(data: Path) -> Iterator[int]:
    """While a worker reads ``data`` of ``make_slow``; gives the end to write to."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            end = os.open(data, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:  # nobody reads yet
            assert time.monotonic() < deadline
            time.sleep(0.02)
    try:
        yield end
    finally:
        os.close(end)


def kill(worker: Worker) -> int:
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await_true(lambda: ended(pid))
    return pid


def test_worker_killed_in_a_message_is_replaced_and_the_message_answered(
    server: Server, bundled: Path, data: list[Path], start: Callable[..., Worker]
) -> None:
    task = task_of(server, server.open_part([0, 1], 0.0)[0])
    content = data[0].read_bytes()
    expected = report_of(start(NodeConfig(str(data[0]))).ask(run_config(bundled), task, Saved()))
    make_slow(data[0])
    worker = start(NodeConfig(str(data[0])))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(worker.ask, run_config(bundled), task, Saved())
        with reader_waits(data[0]):
            first = kill(worker)
            # Until its last thread has ended, the pipe has a reader.
            await_true(lambda: worker.pid not in (None, first))
        with reader_waits(data[0]) as end:
            os.write(end, content)
        assert report_of(answer.result(TIMEOUT)) == expected


def test_message_that_kills_every_worker_is_given_up(
    server: Server, bundled: Path, data: list[Path], start: Callable[..., Worker]
) -> None:
    task = task_of(server, server.open_part([0, 1], 0.0)[0])
    make_slow(data[0])
    worker = start(NodeConfig(str(data[0])))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(worker.ask, run_config(bundled), task, Saved())
        seen: set[int | None] = {None}
        for _ in range(2):
            await_true(lambda: worker.pid not in seen)
            with reader_waits(data[0]):
                seen.add(kill(worker))
        with pytest.raises(WorkerError, match="died 2 times over one message"):
            answer.result(TIMEOUT)
    assert worker.pid is None


NODE = """
import pickle, sys, threading
from pathlib import Path
from fwdllm.protocol.flower.messages import Saved, Task
from fwdllm.protocol.flower.node import NodeConfig
from fwdllm.protocol.flower.worker import Worker

if __name__ == "__main__":
    config, task, data, busy = pickle.loads(Path(sys.argv[1]).read_bytes())
    worker = Worker(NodeConfig(data))
    thread = threading.Thread(target=worker.ask, args=(config, Task(*task), Saved()), daemon=True)
    thread.start()
    if not busy:
        thread.join()
    while worker.pid is None:
        pass
    print(worker.pid, flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize("busy", [False, True])
def test_worker_ends_with_its_node(
    server: Server, bundled: Path, data: list[Path], tmp_path: Path, busy: bool
) -> None:
    task = task_of(server, server.open_part([0, 1], 0.0)[0])
    if busy:
        make_slow(data[0])
    message = (run_config(bundled), tuple(vars(task).values()), str(data[0]), busy)
    (tmp_path / "message").write_bytes(pickle.dumps(message))
    (tmp_path / "node.py").write_text(NODE, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "node.py"), str(tmp_path / "message")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as node:
        try:
            assert node.stdout is not None
            pid = int(node.stdout.readline())
            with reader_waits(data[0]) if busy else nullcontext():
                assert not ended(pid)
                node.kill()
                await_true(lambda: ended(pid))
        finally:
            node.kill()


def test_changed_data_is_noticed(
    server: Server,
    bundled: Path,
    data: list[Path],
    lines: list[str],
    start: Callable[..., Worker],
) -> None:
    task = task_of(server, server.open_part([0, 1], 0.0)[0])
    worker = start(NodeConfig(str(data[0])))
    config = run_config(bundled)
    before = worker.ask(config, task, Saved())
    assert report_of(worker.ask(config, task, Saved())) == report_of(before)
    # As many bytes, and the time of the last change that it had.
    facts = data[0].stat()
    content = data[0].read_bytes()
    other = content.replace(b"e", b"o")
    assert len(other) == len(content)
    with open(data[0], "r+b") as file:
        file.write(other.replace(b"complotion", b"completion").replace(b"toxt", b"text")
                   .replace(b"rolo", b"role").replace(b"mossagos", b"messages"))  # fmt: skip
    os.utime(data[0], ns=(facts.st_atime_ns, facts.st_mtime_ns))
    after = worker.ask(config, task, Saved())
    fresh = start(NodeConfig(str(data[0]))).ask(config, task, Saved())
    assert report_of(after) == report_of(fresh)
    assert report_of(after) != report_of(before)
    data[0].unlink()
    gone = worker.ask(config, task, Saved())
    assert gone.fault == (f"<class 'fwdllm.engine.errors.DataError'>:<'{data[0]} does not exist'>")
    write(data[0], lines[:20:2])
    assert report_of(worker.ask(config, task, Saved())) == report_of(before)


def test_replaced_model_is_refused(
    server: Server, bundled: Path, data: list[Path], tmp_path: Path, start: Callable[..., Worker]
) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(bundled, model)
    task = task_of(server, server.open_part([0, 1], 0.0)[0])
    worker = start(NodeConfig(str(data[0]), str(model)))
    before = worker.ask(run_config(bundled), task, Saved())
    changed = bytearray(bundled.read_bytes())
    changed[-1] ^= 1
    (tmp_path / "other.gguf").write_bytes(changed)
    os.replace(tmp_path / "other.gguf", model)
    refused = worker.ask(run_config(bundled), task, Saved())
    said = f"{model} is not the model of this federation"
    assert refused.fault == f"<class 'fwdllm.engine.errors.ConfigError'>:<'{said}'>"
    shutil.copy(bundled, tmp_path / "same.gguf")
    os.replace(tmp_path / "same.gguf", model)
    assert report_of(worker.ask(run_config(bundled), task, Saved())) == report_of(before)


def test_other_settings_are_not_answered_by_the_engine_of_the_last(
    server: Server, bundled: Path, data: list[Path], start: Callable[..., Worker]
) -> None:
    task = task_of(server, server.open_part([0, 1], 0.0)[0])
    worker = start(NodeConfig(str(data[0])))
    before = worker.ask(run_config(bundled), task, Saved())
    other = {**run_config(bundled), "federation.seed": 5}
    changed = worker.ask(other, task, Saved())
    assert report_of(changed) == report_of(
        start(NodeConfig(str(data[0]))).ask(other, task, Saved())
    )
    assert report_of(changed) != report_of(before)
    wrong = worker.ask({**run_config(bundled), "lora.rank": "no"}, task, Saved())
    assert wrong.fault is not None
    assert "ConfigError" in wrong.fault
    assert report_of(worker.ask(run_config(bundled), task, Saved())) == report_of(before)


def test_two_nodes_share_nothing_and_nobody_can_reach_a_worker(
    server: Server, bundled: Path, data: list[Path], tmp_path: Path, start: Callable[..., Worker]
) -> None:
    task = task_of(server, server.open_part([0, 1], 0.0)[0])
    workers = [start(NodeConfig(str(path))) for path in data]
    found = [report_of(worker.ask(run_config(bundled), task, Saved())) for worker in workers]
    assert found[0] != found[1]
    assert workers[0].pid != workers[1].pid
    for worker, others in zip(workers, reversed(data), strict=True):
        process = psutil.Process(worker.pid)
        assert [c for c in process.net_connections("inet") if c.status == "LISTEN"] == []
        assert [c.laddr for c in process.net_connections("unix") if c.laddr] == []
        assert str(others) not in {file.path for file in process.open_files()}
        inside = {module.path for module in process.memory_maps()}
        assert not any("grpc" in path for path in inside)  # nothing of Flower's is loaded


class Connection:
    """SuperLink's side of a node, with the messages to be taken; then it fails."""

    def __init__(self, takes: int) -> None:
        self.takes = takes

    def __iter__(self) -> Iterator[Any]:
        return iter([1, self.receive, *[None] * 6])

    def receive(self) -> None:
        self.takes -= 1
        if self.takes < 0:
            raise ConnectionError


def test_idle_node_lets_the_model_go(
    server: Server,
    bundled: Path,
    data: list[Path],
    start: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = task_of(server, server.open_part([0, 1], 0.0)[0])
    worker = start(NodeConfig(str(data[0])))
    worker.ask(run_config(bundled), task, Saved())
    with pytest.raises(ConnectionError):
        _Node(Connection(3), worker).serve()
    pid = worker.pid
    assert pid is not None
    monkeypatch.setattr(supernode, "_IDLE", 0.15)
    with pytest.raises(ConnectionError):
        _Node(Connection(4), worker).serve()
    assert worker.pid is None
    assert ended(pid)
