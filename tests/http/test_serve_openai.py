"""The server with OpenAI's own client: what works against api.openai.com works here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import pytest
from cli_runs import MODEL, TRAIN
from serving import (
    FINISHED,
    JOB_TIMEOUT,
    LONG,
    NAME,
    SETTINGS,
    TRAIN_ROWS,
    VALID,
    Server,
    adapter_of_tune,
    lines,
)

from fwdllm import generate
from fwdllm.engine.llamacpp import generation

openai = pytest.importorskip("openai")

QUESTION = "What does a cow say?"
TEXTS = ["Hello there.", "The sea is deep and the ship is small."]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("openai") / "state") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with client_of(server) as made:
        yield made


@pytest.fixture(scope="module")
def tuned(client: Any) -> Any:
    """A job that has succeeded, on the bundled data."""
    with open(TRAIN, "rb") as train, open(VALID, "rb") as valid:
        training = client.files.create(file=train, purpose="fine-tune")
        validation = client.files.create(file=valid, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=NAME,
        training_file=training.id,
        validation_file=validation.id,
        suffix="pirate",
        seed=7,
        extra_body={"fwdllm": SETTINGS},
    )
    return finished(client, job.id)


def client_of(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def finished(client: Any, id: str) -> Any:
    deadline = time.monotonic() + JOB_TIMEOUT
    while (job := client.fine_tuning.jobs.retrieve(id)).status not in FINISHED:
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    return job


def answer(client: Any, model: str) -> str:
    """A greedy one to the question."""
    messages = [{"role": "user", "content": QUESTION}]
    found = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=16
    )
    assert found.usage.completion_tokens <= 16
    return str(found.choices[0].message.content)


# Inference


def test_the_base_model_is_listed_first(client: Any) -> None:
    first = next(iter(client.models.list()))
    assert (first.id, first.object) == (NAME, "model")
    assert client.models.retrieve(NAME) == first


def test_a_completion_is_what_llama_cpp_generates(client: Any) -> None:
    found = client.completions.create(model=NAME, prompt="A cow", max_tokens=8, temperature=0)
    assert found.choices[0].text == "".join(generate(MODEL, "A cow", max_tokens=8))
    assert found.model == NAME
    assert 0 < found.usage.completion_tokens <= 8


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: Any) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    stream = client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=16, stream=True
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert sum(piece is not None for piece in pieces) > 2
    assert "".join(piece or "" for piece in pieces) == answer(client, NAME)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_an_answer_with_a_schema_is_parsed(client: Any) -> None:
    class Cow(pydantic.BaseModel):
        says: Literal["moo", "baa"]
        legs: Annotated[int, pydantic.Field(ge=0, le=4)]

    found = client.chat.completions.parse(
        model=NAME, messages=[{"role": "user", "content": QUESTION}], response_format=Cow
    )
    assert isinstance(found.choices[0].message.parsed, Cow)


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_embeddings_are_llama_cpps_of_length_one(client: Any, encoding: str | None) -> None:
    """Without an encoding the client asks for base64 and unpacks it."""
    options = {} if encoding is None else {"encoding_format": encoding}
    found = client.embeddings.create(model=NAME, input=TEXTS, **options)
    assert [item.index for item in found.data] == [0, 1]
    assert found.usage.prompt_tokens > 4
    if encoding == "base64":
        assert all(isinstance(item.embedding, str) for item in found.data)
        return
    vectors = np.array([item.embedding for item in found.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # The server keeps keys and values in half precision.
    np.testing.assert_allclose(vectors, generation.embed(MODEL, TEXTS), atol=3e-3)


# Files


def test_files_are_kept_as_they_are_until_deleted(client: Any) -> None:
    content = lines({"text": "one"}, {"text": "two"})
    made = client.files.create(file=("two.jsonl", content), purpose="fine-tune")
    assert (made.filename, made.bytes, made.status) == ("two.jsonl", len(content), "processed")
    assert client.files.content(made.id).read() == content
    assert client.files.retrieve(made.id) == made
    assert made.id in [file.id for file in client.files.list()]
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_lists_come_in_pages(client: Any) -> None:
    made = [
        client.files.create(file=(f"{i}.jsonl", lines({"text": "x"})), purpose="fine-tune").id
        for i in range(5)
    ]
    listed = [file.id for file in client.files.list(limit=2)]
    assert listed[:5] == made[::-1]
    assert len(listed) == len(set(listed))
    for id in made:
        client.files.delete(id)


# Fine-tuning


def test_a_job_succeeds_and_tells_its_steps(client: Any, tuned: Any) -> None:
    assert tuned.status == "succeeded", tuned.error
    assert tuned.error is None
    assert tuned.fine_tuned_model.startswith(f"ft:{NAME}:pirate:")
    assert tuned.trained_tokens > 0
    assert tuned.finished_at >= tuned.created_at
    assert tuned.seed == 7
    events = list(client.fine_tuning.jobs.list_events(tuned.id, limit=7))
    assert len({event.id for event in events}) == len(events)
    steps = [e.data["step"] for e in events if e.type == "metrics" and "train_loss" in e.data]
    assert steps == list(range(SETTINGS["steps"], 0, -1))  # newest first
    held_out = [e.data["valid_loss"] for e in events if e.data and "valid_loss" in e.data]
    assert held_out[0] < held_out[-1]
    assert tuned.fine_tuned_model in events[1].message


def test_a_jobs_adapter_is_that_of_tune(server: Server, tuned: Any, tmp_path: Path) -> None:
    expected = adapter_of_tune(SETTINGS, tmp_path, seed=7, data=TRAIN, eval_data=VALID)
    assert server.content(tuned.adapter) == expected


def test_a_tuned_model_answers_as_with_its_downloaded_adapter(
    server: Server, client: Any, tuned: Any, tmp_path: Path
) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == NAME
    assert tuned.fine_tuned_model in names
    adapter = tmp_path / "adapter.gguf"
    adapter.write_bytes(server.content(tuned.adapter))
    here = generate(MODEL, QUESTION, adapter=adapter, max_tokens=16, chat=True)
    base = generate(MODEL, QUESTION, max_tokens=16, chat=True)
    assert answer(client, tuned.fine_tuned_model) == "".join(here)
    assert answer(client, NAME) == "".join(base)  # and not what was loaded last


def test_checkpoints_are_models_too(client: Any, tuned: Any) -> None:
    found = list(client.fine_tuning.jobs.checkpoints.list(tuned.id))
    assert [checkpoint.step_number for checkpoint in found] == [24, 18, 12]
    assert {checkpoint.fine_tuning_job_id for checkpoint in found} == {tuned.id}
    assert found[0].metrics.train_loss > 0
    assert found[0].metrics.full_valid_loss > 0
    names = [checkpoint.fine_tuned_model_checkpoint for checkpoint in found]
    assert answer(client, names[0]) == answer(client, tuned.fine_tuned_model)
    assert isinstance(answer(client, names[2]), str)


def test_a_deleted_model_is_gone(server: Server, client: Any) -> None:
    made = server.post("/v1/adapters", {"rank": 1, "suffix": "gone"})
    assert answer(client, made["model"])
    assert client.models.delete(made["model"]).deleted
    for ask in (client.models.retrieve, client.models.delete, lambda m: answer(client, m)):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(made["model"])
        assert refused.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(NAME)


def test_a_cancelled_job_stays_so_and_its_process_ends(server: Server, client: Any) -> None:
    others = set(server.descendants())  # that render templates, for example
    id = server.create_job(LONG)
    server.await_step(id, 2)
    assert client.fine_tuning.jobs.cancel(id).status == "cancelled"
    deadline = time.monotonic() + 20
    while set(server.descendants()) - others:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job = client.fine_tuning.jobs.retrieve(id)
    assert (job.status, job.fine_tuned_model, job.error) == ("cancelled", None, None)
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(id)


def test_a_paused_and_resumed_job_gives_the_adapter_of_an_uninterrupted_one(
    server: Server, client: Any, tuned: Any
) -> None:
    id = server.create_job(
        seed=7, training_file=tuned.training_file, validation_file=tuned.validation_file
    )
    for step in (5, 13):
        server.await_step(id, step)
        assert client.fine_tuning.jobs.pause(id).status == "paused"
        assert client.fine_tuning.jobs.resume(id).status in ("queued", "running")
    assert finished(client, id).status == "succeeded"
    steps = [e["data"]["step"] for e in server.events(id) if "train_loss" in (e["data"] or {})]
    assert steps == list(range(1, 25))
    assert server.result(id) == server.content(tuned.adapter)
    assert server.job(id)["trained_tokens"] == tuned.trained_tokens


def test_a_paused_job_waits_and_lets_others_pass(server: Server, client: Any) -> None:
    id = server.create_job(LONG)
    server.await_step(id, 1)
    client.fine_tuning.jobs.pause(id)
    other = server.create_job({**SETTINGS, "steps": 5})
    assert finished(client, other).status == "succeeded"
    assert client.fine_tuning.jobs.retrieve(id).status == "paused"
    client.fine_tuning.jobs.cancel(id)


def test_jobs_queue_up_and_all_are_done(server: Server, client: Any) -> None:
    """A job's end, when its process is told things it no longer reads, must not end the queue."""
    file = server.upload(TRAIN_ROWS)
    short = {**SETTINGS, "steps": 1, "warmup": 0}
    ids = [server.create_job(short, training_file=file, seed=seed) for seed in range(4)]
    jobs = [finished(client, id) for id in ids]
    assert [job.status for job in jobs] == ["succeeded"] * 4
    assert [job.finished_at for job in jobs] == sorted(job.finished_at for job in jobs)
    assert len({server.content(job.adapter) for job in jobs}) == 4


def test_a_job_that_cannot_be_done_fails_with_a_sentence(server: Server, client: Any) -> None:
    """The line is longer than the context, which only reading it with the model can tell."""
    settings = {name: value for name, value in SETTINGS.items() if name != "max_tokens"}
    file = server.upload(lines({"text": "short"}, {"text": "word " * 2000}))
    job = finished(client, server.create_job(settings, training_file=file))
    assert job.status == "failed"
    assert "tokens" in job.error.message
    assert "Traceback" not in job.error.message
    assert job.error.message in client.fine_tuning.jobs.list_events(job.id).data[0].message
    assert job.fine_tuned_model is None


def test_a_memory_budget_too_small_fails_a_job_and_not_the_server(tmp_path: Path) -> None:
    budget = ("--memory-budget", "1MiB")
    with Server(tmp_path / "state", *budget) as server, client_of(server) as client:
        job = finished(client, server.create_job())
        assert job.status == "failed"
        assert "memory" in job.error.message
        assert answer(client, NAME)
