"""What of a sparse adapter is trained: when it is chosen, by what, and that all choose the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import pirate_rows, write_rows

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.directions import Dense, Sparse
from fwdllm.engine.directions.sparse import chosen_in_training
from fwdllm.engine.engine import Engine
from fwdllm.engine.files import fingerprint
from fwdllm.engine.settings import LoRAConfig, estimating
from fwdllm.federation.simulation import Closed, Event, Partition, simulate
from fwdllm.federation.summary import check_adapter
from fwdllm.kernels import cpu
from fwdllm.protocol import wire
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.flower.messages import Saved, Settings, Task
from fwdllm.protocol.flower.node import Node, NodeConfig
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.optimizers import OptimizerState
from fwdllm.protocol.presets import preset
from fwdllm.protocol.records import Meta
from fwdllm.protocol.replay import verify
from fwdllm.protocol.selection import Selection
from fwdllm.protocol.server import Server

STEPS, RESELECT = 100, 8
WINDOW = estimating(RESELECT)
ADAM = FederationConfig(STEPS, optimizer="adam")


class Run:
    """An adapter with 80 candidates, a fourth of them trained, and a selection of it."""

    def __init__(self, again: bool = True, keep: float = 0.25, reselect: int = RESELECT) -> None:
        lora = LoRAConfig(2, targets=("attn_q",))
        self.adapter = Adapter.create("llama", {"blk.0.attn_q": (40, 6)}, lora, 1, cpu)
        self.directions: Sparse = chosen_in_training(Dense(self.adapter), keep, reselect, again)
        found = Selection.of(self.directions, STEPS, 3)
        assert found is not None
        self.selection = found
        self.candidates = np.flatnonzero(self.directions.mask)
        self.optimizer = OptimizerState.initial(ADAM, self.directions.size)
        self.step = 0

    @property
    def perturbed(self) -> np.ndarray:
        return self.directions.mask[self.candidates] > 0

    @property
    def theta(self) -> np.ndarray:
        return self.adapter.theta

    def advance(self, gradient: np.ndarray | None, move: float = 0.0) -> None:
        """A step whose gradient by the candidates is given; trained ones move by ``move``."""
        whole = None
        if gradient is not None:
            whole = np.zeros(self.directions.size, np.float32)
            whole[self.candidates] = gradient * self.perturbed
            moved = self.selection.of_trained(whole) != 0
            self.theta[moved] += np.float32(move)
        self.selection.advance(self.step, whole, self.theta, self.optimizer)
        self.step += 1

    def until(self, step: int, gradient: np.ndarray, move: float = 0.0) -> None:
        while self.step < step:
            self.advance(gradient, move)


def rising(n: int = 80) -> np.ndarray:
    """The last candidates have the largest gradients, with either sign."""
    return (np.arange(n) * (-1) ** np.arange(n)).astype(np.float32)


def test_nothing_is_trained_before_the_largest_sums_are_chosen() -> None:
    run = Run()
    assert run.perturbed.all()
    assert not run.selection.of_trained(np.ones(run.directions.size, np.float32)).any()
    run.until(WINDOW, rising())
    np.testing.assert_array_equal(run.perturbed, np.arange(80) >= 60)


def test_of_a_gradient_the_trained_and_a_head_are_left() -> None:
    run = Run()
    run.until(WINDOW, rising())
    found = run.selection.of_trained(np.ones(run.directions.size + 5, np.float32))
    assert found[-5:].all()
    np.testing.assert_array_equal(found[: run.directions.size], run.directions.mask)


def test_gradients_are_added_up_over_the_steps_before_a_choice() -> None:
    run = Run()
    first, second = np.zeros((2, 80), np.float32)
    first[:20], second[:20], second[20:40] = 3, -3, 2
    run.advance(first)
    run.advance(second)
    assert (run.perturbed == ((np.arange(80) >= 20) & (np.arange(80) < 40))).all()


def test_a_first_choice_without_any_gradient_is_the_seeds() -> None:
    run = Run()
    for _ in range(WINDOW):
        run.advance(None)
    assert run.perturbed.sum() == 20
    assert not run.perturbed[:20].all()


def test_sparse_chooses_once() -> None:
    run = Run(again=False)
    run.until(WINDOW, rising())
    before = run.perturbed
    run.until(STEPS, rising()[::-1].copy())
    np.testing.assert_array_equal(run.perturbed, before)


def test_candidates_are_estimated_before_each_choice_and_the_end_only_trains() -> None:
    run = Run()
    estimated = []
    while run.step < STEPS:
        estimated += [run.step] if run.perturbed.all() else []
        run.advance(rising())
    last = STEPS // RESELECT * RESELECT - RESELECT
    want = [s for s in range(last) if s % RESELECT >= RESELECT - WINDOW]
    assert estimated == [*range(WINDOW), *want]


def test_those_that_moved_least_make_room_for_the_largest_sums() -> None:
    run = Run()
    run.until(WINDOW, rising(), move=1.0)
    trained = run.candidates[60:]
    run.theta[trained] = np.linspace(-1, 1, 20, dtype=np.float32)
    run.optimizer.slots["mean"][trained] = 5
    run.optimizer.slots["square"][trained] = np.arange(1, 21)
    run.until(RESELECT, rising()[::-1].copy())
    assert int(0.2 * (1 - RESELECT / STEPS) * 20) == 3
    before, taken = np.arange(80) >= 60, np.arange(80) < 3
    gone = before & ~run.perturbed
    np.testing.assert_array_equal(run.perturbed, before & ~gone | taken)
    # Of the two with equal values one stays.
    assert gone.sum() == 3
    assert gone[[69, 70]].all()
    assert gone[[68, 71]].sum() == 1
    for values in (run.theta, *run.optimizer.slots.values()):
        assert not values[run.candidates[gone]].any()
    mean, square = (run.optimizer.slots[name][run.candidates] for name in ("mean", "square"))
    assert not mean[taken].any()
    np.testing.assert_allclose(square[taken], square[before & ~gone].mean())


def test_all_may_be_trained() -> None:
    run = Run(keep=1.0)
    run.until(STEPS, rising())
    assert run.perturbed.all()


def test_a_state_that_is_loaded_goes_on_to_the_same_choices() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(STEPS, 80)).astype(np.float32)
    whole = Run()
    for at in range(3 * RESELECT):
        arrays = {k: v.copy() for k, v in whole.selection.to_arrays().items()}
        other = Run()
        other.selection.load_arrays(at, arrays)
        other.step = at
        other.theta[:] = whole.theta
        np.testing.assert_array_equal(other.perturbed, whole.perturbed)
        for run in (other, whole):
            run.advance(gradients[at], float(at))
        np.testing.assert_array_equal(other.perturbed, whole.perturbed)
        assert other.theta.tobytes() == whole.theta.tobytes()


@pytest.mark.parametrize(
    ("name", "array", "sentence"),
    [
        ("sums", None, "a state of a sparse run has no sums"),
        ("sums", np.zeros(79, np.float32), "79 numbers of sums are not 80"),
        ("trained", np.zeros(1, np.uint64), "1 numbers of trained are not 2"),
    ],
)
def test_states_of_another_run_are_refused(name: str, array: Any, sentence: str) -> None:
    run = Run()
    arrays = run.selection.to_arrays()
    arrays.pop(name)
    if array is not None:
        arrays[name] = array
    with pytest.raises(ValueError, match=sentence):
        run.selection.load_arrays(0, arrays)


# Federations of the bundled model


def n_rounds(events: list[Event]) -> int:
    return sum(isinstance(event, Closed) for event in events)


@pytest.mark.parametrize(
    ("directions", "split", "stop"), [("sparse", True, 1), ("spiel", False, 7), ("spiel", True, 9)]
)
def test_a_federation_stopped_and_resumed_replays(
    bundled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    directions: str,
    split: bool,
    stop: int,
) -> None:
    """Stopped where all candidates are estimated, between two snapshots, or after a choice."""
    monkeypatch.setattr("fwdllm.federation.plot.draw", lambda ledger, path: path.touch())
    changes = {"per_round": 3, "batch_size": 2, "max_tokens": 24, "eval_every": 0, "split": split}
    changes |= {"directions": directions, "keep": 0.25, "reselect": 8, "snapshot_every": 4}
    config = preset("spry", rounds=16, **changes)
    few = write_rows(tmp_path / "few.jsonl", pirate_rows(10))

    def run(name: str, **options: Any) -> bytes:
        made = {"lora": LoRAConfig(2, 4), "partition": Partition(3), **options}
        simulate(bundled, few, tmp_path / name, config, **made)
        return (tmp_path / name / "adapter.gguf").read_bytes()

    closed: list[Event] = []
    want = run("whole")
    run("part", on_event=closed.append, should_stop=lambda: n_rounds(closed) == stop)
    assert n_rounds(closed) == stop
    assert run("part", resume=True) == want
    with Ledger(tmp_path / "part" / NAME) as ledger:
        verify(ledger)
        check_adapter(ledger, tmp_path / "part" / "adapter.gguf")
    adapter = Engine.load(bundled, adapter=tmp_path / "whole" / "adapter.gguf").adapter
    assert adapter is not None
    factors = [adapter.factors(target) for target in adapter.targets]
    n_trained = round(0.25 * sum(lora.b.size for lora in factors))
    assert 0.9 * n_trained < sum(np.count_nonzero(lora.b) for lora in factors) <= n_trained
    assert all(np.count_nonzero(f.a) == len(f.a) for f in factors) == (directions == "spiel")


def test_a_node_follows_from_state_to_state(bundled: Path, tmp_path: Path) -> None:
    """What it keeps between messages has what a choice is made of."""
    config = preset(
        "spry", rounds=9, directions="spiel", reselect=4, batch_size=2, max_tokens=24, split=False
    )
    settings = Settings(config, LoRAConfig(2, 4), (), str(bundled), "", "", 1)
    adapter = settings.engine(str(bundled)).adapter
    assert adapter is not None
    meta = Meta.of(config, adapter, config.seed, dict(fingerprint(bundled)), 1)
    node = Node(NodeConfig(str(write_rows(tmp_path / "few.jsonl", pirate_rows(10)))))
    saved = Saved()
    with Ledger.create(tmp_path / NAME, meta) as ledger:
        server = Server(ledger)
        while not server.done:
            (a,) = server.open_part([0], 0.0)
            task = Task(
                wire.encode_assignment(a), server.synchronize(0), json.dumps(ledger.meta.model)
            )
            report, saved = node.answer(settings, task, saved)
            assert report is not None
            assert saved.state is not None
            kept = wire.decode_state(saved.state)
            want = server.replica.to_arrays()
            assert all(kept[n].tobytes() == want[n].tobytes() for n in ("theta", "trained", "sums"))
            assert server.receive(0, report, 1.0) is None
            server.close_part(1.0)
        assert server.replica.theta[: adapter.n_lora].any()
