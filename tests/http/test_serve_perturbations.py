"""Perturbations over HTTP: the numbers are those of an engine in this process, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cli_runs import MODEL, pirate_rows
from serving import SETTINGS, Server, error_of, lines

from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.directions import Dense
from fwdllm.engine.engine import Engine
from fwdllm.engine.llamacpp import generation
from fwdllm.engine.settings import Scope

EVALUATE = "/v1/perturbations/evaluate"
ROWS = [
    {"prompt": "What does a cow say?", "completion": " A cow says moo."},
    {"prompt": "Where does a ship sail?", "completion": " It sails on the sea, far away."},
    {"prompt": "Hello", "completion": " Ahoy!"},
]
EXAMPLES = [Example(prompt=row["prompt"], completion=row["completion"]) for row in ROWS]
SEEDS = [0, 7, 123456789, 2**64 - 1]
COEFFICIENTS = [0.013, -0.4, 1e-4, 0.25]

TEXTS = ["a wonderful film", "dull and far too long", "I loved it", "a waste of an evening"]
LABELS = ["good", "bad", "good", "bad"]
LABELLED = [{"text": t, "label": label} for t, label in zip(TEXTS, LABELS, strict=True)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("decoder") / "state") as running:
        yield running


@pytest.fixture(scope="module")
def encoder(shared: Path) -> Path:
    path = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    if not path.exists():
        pytest.skip("shared/models/minilm-l6-v2.Q4_0.gguf is not here")
    return path


@pytest.fixture(scope="module")
def classifier(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("encoder") / "state", model=encoder) as running:
        yield running


def new_adapter(server: Server, **options: object) -> Any:
    return server.post("/v1/adapters", {"rank": 2, "alpha": 4.0, **options})


def moved_adapter(server: Server, **options: object) -> Any:
    """One that does something; a new one has slopes in half of its parameters only."""
    made = new_adapter(server, **options)
    body = {"seeds": [99], "coefficients": [0.02]}
    return server.post(f"/v1/adapters/{made['id']}/updates", body)


def engine_at(server: Server, id: str, folder: Path, model: Path = MODEL) -> Engine:
    """An engine here with the adapter as it is there."""
    path = folder / "there.gguf"
    path.write_bytes(server.content(id))
    return Engine.load(model, adapter=path)


def theta(engine: Engine) -> np.ndarray:
    assert engine.adapter is not None
    return engine.adapter.theta


# Losses and slopes


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize(
    ("scope", "distribution"),
    [
        ({}, "normal"),
        ({"layers": [1, 2]}, "normal"),
        ({"targets": ["attn_v"], "layers": [0]}, "rademacher"),
    ],
)
@pytest.mark.parametrize("method", ["forward-ad", "central", "forward-difference", "backprop"])
def test_slopes_are_those_of_an_engine_here(
    server: Server,
    tmp_path: Path,
    method: str,
    scope: dict[str, Any],
    distribution: str,
    per_example: bool,
) -> None:
    id = moved_adapter(server)["id"]
    body = {
        "adapter": id,
        "examples": ROWS,
        "seeds": SEEDS,
        "method": method,
        "epsilon": 1e-2,
        "scope": scope,
        "distribution": distribution,
        "per_example": per_example,
    }
    found = server.post(EVALUATE, body)

    engine = engine_at(server, id, tmp_path)
    batch = engine.encode(EXAMPLES)
    assert engine.adapter is not None
    named = Scope(*(tuple(scope[n]) if n in scope else None for n in ("layers", "targets")))
    directions = Dense(engine.adapter, distribution, named)
    seeds = np.array(SEEDS, np.uint64)
    probe = engine.directional_derivatives(
        batch, seeds, method, 1e-2, directions=directions, per_example=per_example
    )
    assert found["loss"] == probe.loss
    assert found["losses"] == engine.loss(batch).tolist()
    assert found["derivatives"] == probe.derivative.tolist()
    assert found["seeds"] == probe.seeds.tolist()
    assert found["n_tokens"] == probe.n_tokens
    assert found["head_gradient"] is None
    assert np.ptp(np.array(found["derivatives"])) > 0


def test_examples_are_cut_as_asked(server: Server, tmp_path: Path) -> None:
    id = moved_adapter(server)["id"]
    body = {"adapter": id, "examples": ROWS, "seeds": [1], "max_tokens": 12}
    engine = engine_at(server, id, tmp_path)
    expected = engine.loss(engine.encode(EXAMPLES, 12)).tolist()
    assert server.post(EVALUATE, body)["losses"] == expected
    assert server.post(EVALUATE, {**body, "max_tokens": None})["losses"] != expected


def test_adapters_are_evaluated_in_turns(server: Server) -> None:
    """The server has one at a time in its engine."""
    ids = [moved_adapter(server, seed=seed)["id"] for seed in (1, 2)]
    bodies = [{"adapter": id, "examples": ROWS, "seeds": [5]} for id in ids]
    first = [server.post(EVALUATE, body) for body in bodies]
    assert [server.post(EVALUATE, body) for body in bodies] == first
    assert first[0]["derivatives"] != first[1]["derivatives"]


# Adapters and updates


def test_a_new_adapter_is_that_of_an_engine_and_changes_nothing(
    server: Server, tmp_path: Path
) -> None:
    made = new_adapter(server, seed=3, targets=["attn_q"], layers=[0, 1], suffix="new")
    assert (made["version"], made["job"], made["base_model"]) == (0, None, MODEL.stem)
    assert made["model"].startswith(f"ft:{MODEL.stem}:new:")
    engine = engine_at(server, made["id"], tmp_path)
    assert made["n_parameters"] == theta(engine).size
    assert made["bytes"] == len(server.content(made["id"]))
    found = server.post(EVALUATE, {"adapter": made["id"], "examples": ROWS, "seeds": [1]})
    bare = Engine.load(MODEL)
    assert found["losses"] == bare.loss(bare.encode(EXAMPLES)).tolist()
    assert made in server.get("/v1/adapters")["data"]


@pytest.mark.parametrize(
    ("scope", "distribution"),
    [({}, "normal"), ({"layers": [1]}, "rademacher"), ({"targets": ["attn_v"]}, "normal")],
)
def test_an_update_moves_theta_along_the_directions(
    server: Server, tmp_path: Path, scope: dict[str, Any], distribution: str
) -> None:
    made = moved_adapter(server)
    before = engine_at(server, made["id"], tmp_path)
    assert before.adapter is not None
    named = Scope(*(tuple(scope[n]) if n in scope else None for n in ("layers", "targets")))
    step = Dense(before.adapter, distribution, named).combine(
        np.array(SEEDS, np.uint64), np.array(COEFFICIENTS, np.float32)
    )
    body = {"seeds": SEEDS, "coefficients": COEFFICIENTS, "scope": scope, "version": 1}
    body["distribution"] = distribution
    after = server.post(f"/v1/adapters/{made['id']}/updates", body)
    assert after == {**made, "version": 2}
    expected = theta(before) + step
    assert theta(engine_at(server, made["id"], tmp_path)).tobytes() == expected.tobytes()
    assert not np.array_equal(expected, theta(before))
    # The same request again, as of a client that did not get the answer, is not applied twice.
    repeated = server.http.post(f"/v1/adapters/{made['id']}/updates", json=body)
    assert error_of(repeated)["code"] == "version_conflict"
    assert repeated.status_code == 409
    assert theta(engine_at(server, made["id"], tmp_path)).tobytes() == expected.tobytes()


def test_updates_outlive_a_kill(tmp_path: Path) -> None:
    with Server(tmp_path / "state") as server:
        id = new_adapter(server)["id"]
        engine = engine_at(server, id, tmp_path)
        assert engine.adapter is not None
        directions = Dense(engine.adapter)
        for i in range(5):
            body = {"seeds": [i, i + 100], "coefficients": [0.1 * i, -0.05], "version": i}
            server.post(f"/v1/adapters/{id}/updates", body)
            seeds, weights = np.array(body["seeds"], np.uint64), np.float32(body["coefficients"])
            theta(engine)[:] += directions.combine(seeds, weights)
        before = server.get(f"/v1/adapters/{id}")
        psutil.wait_procs(server.kill())
        server.start()
        assert server.get(f"/v1/adapters/{id}") == before
        assert before["version"] == 5
        assert theta(engine_at(server, id, tmp_path)).tobytes() == theta(engine).tobytes()
        found = server.post(EVALUATE, {"adapter": id, "examples": ROWS, "seeds": [1]})
        assert found["losses"] == engine.loss(engine.encode(EXAMPLES)).tolist()


def test_an_app_can_train_with_the_two_verbs(server: Server) -> None:
    """SPSA on one batch, whose loss it must lower."""
    id = new_adapter(server, suffix="spsa")["id"]
    body = {"adapter": id, "examples": pirate_rows(4)}
    losses = []
    for step in range(15):
        seeds = list(range(8 * step, 8 * step + 8))
        found = server.post(EVALUATE, {**body, "seeds": seeds})
        losses.append(found["loss"])
        weights = [-0.02 * slope / len(seeds) for slope in found["derivatives"]]
        update = {"seeds": seeds, "coefficients": weights, "version": step}
        server.post(f"/v1/adapters/{id}/updates", update)
    assert min(losses[-3:]) < losses[0] - 0.5


def test_what_answers_is_the_adapter_after_its_update(server: Server) -> None:
    made = new_adapter(server)
    prompt = {"model": made["model"], "prompt": "A cow", "max_tokens": 8, "temperature": 0}
    before = server.post("/v1/completions", prompt)["choices"][0]["text"]
    body = {"seeds": [1, 2], "coefficients": [0.5, 0.5]}
    server.post(f"/v1/adapters/{made['id']}/updates", body)
    assert server.post("/v1/completions", prompt)["choices"][0]["text"] != before


def test_a_deleted_adapter_is_gone(server: Server) -> None:
    id = moved_adapter(server)["id"]
    assert server.http.delete(f"/v1/adapters/{id}").json()["deleted"]
    for answer in (
        server.http.get(f"/v1/adapters/{id}"),
        server.http.delete(f"/v1/adapters/{id}"),
        server.http.post(EVALUATE, json={"adapter": id, "examples": ROWS, "seeds": [1]}),
    ):
        assert error_of(answer)["code"] == "adapter_not_found"


# An encoder


def test_an_encoder_embeds_and_does_not_generate(classifier: Server, encoder: Path) -> None:
    data = classifier.post("/v1/embeddings", {"input": TEXTS})["data"]
    vectors = np.array([item["embedding"] for item in data])
    np.testing.assert_allclose(vectors, generation.embed(encoder, TEXTS), atol=3e-3)
    answer = classifier.http.post("/v1/completions", json={"prompt": "x"})
    assert error_of(answer)["code"] == "model_not_supported"
    assert classifier.get("/v1/server")["encoder"]


def test_an_encoders_head_has_its_gradient_and_moves(
    classifier: Server, encoder: Path, tmp_path: Path
) -> None:
    id = new_adapter(classifier, labels=["bad", "good"], targets=["attn_q"])["id"]
    body = {"adapter": id, "examples": LABELLED, "seeds": SEEDS[:2]}
    found = classifier.post(EVALUATE, body)
    engine = engine_at(classifier, id, tmp_path, encoder)
    pairs = zip(TEXTS, LABELS, strict=True)
    batch = engine.encode([Example(text=text, label=label) for text, label in pairs])
    probe = engine.directional_derivatives(batch, np.array(SEEDS[:2], np.uint64))
    assert probe.head_gradient is not None
    assert found["derivatives"] == probe.derivative.tolist()
    assert found["head_gradient"] == probe.head_gradient.tolist()
    assert found["losses"] == engine.loss(batch).tolist()

    head = [-0.5 * slope for slope in found["head_gradient"]]
    update = {"seeds": [1], "coefficients": [0.0], "head": head}
    classifier.post(f"/v1/adapters/{id}/updates", update)
    assert engine.adapter is not None
    expected = theta(engine).copy()
    expected[engine.adapter.n_lora :] += np.array(head, np.float32)
    assert theta(engine_at(classifier, id, tmp_path, encoder)).tobytes() == expected.tobytes()
    assert classifier.post(EVALUATE, body)["loss"] < found["loss"]


def test_examples_with_labels_that_the_head_does_not_know_are_refused(classifier: Server) -> None:
    id = new_adapter(classifier, labels=["bad", "good"])["id"]
    for example in ({"text": "x", "label": "ugly"}, {"text": "x"}):
        body = {"adapter": id, "examples": [example], "seeds": [1]}
        error = error_of(classifier.http.post(EVALUATE, json=body))
        assert "label" in error["message"]
    assert "label" in error_of(classifier.http.post("/v1/adapters", json={}))["message"]


def test_an_encoder_is_tuned_on_labels(classifier: Server) -> None:
    file = classifier.upload(lines(*LABELLED * 8))
    settings = {"steps": 6, "batch_size": 8, "eval_every": 3}
    id = classifier.create_job(settings, training_file=file)
    job = classifier.await_status(id, "succeeded")
    told = [e["data"] for e in classifier.events(id) if e["data"]]
    assert [data["valid_accuracy"] for data in told if "valid_accuracy" in data]
    assert job["fwdllm"]["method"] == "backprop"
    text = classifier.upload(lines({"text": "no label"}))
    body = {"model": job["model"], "training_file": text, "fwdllm": SETTINGS}
    error = error_of(classifier.http.post("/v1/fine_tuning/jobs", json=body))
    assert error["param"] == "training_file"
