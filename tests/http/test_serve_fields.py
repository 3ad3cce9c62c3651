"""Every field of OpenAI's requests: honoured, harmless, or an error that names it."""

from __future__ import annotations

import base64
import struct
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import NAME, PURPOSE, SETTINGS, TRAIN_ROWS, Server, error_of, lines, succeeded

openai = pytest.importorskip("openai")

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
JOBS = "/v1/fine_tuning/jobs"
HELLO = [{"role": "user", "content": "Hello"}]
INPUT: dict[str, Any] = {
    CHAT: {"messages": HELLO, "max_tokens": 4, "temperature": 0},
    TEXT: {"prompt": "A cow", "max_tokens": 4, "temperature": 0},
    EMBED: {"input": "A cow"},
}
# Values of fields that change no answer, and of fields that this server has not.
HARMLESS: dict[str, dict[str, Any]] = {
    CHAT: {
        "modalities": ["text"], "parallel_tool_calls": True, "service_tier": "auto",
        "prediction": {"type": "content", "content": "Hello"}, "prompt_cache_key": "a",
        "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "24h",
        "safety_identifier": "a", "store": False, "metadata": {"a": "b"}, "user": "a",
        "verbosity": "medium", "stream_options": {"include_usage": True}, "tool_choice": "auto",
        "n": 1, "logprobs": False, "response_format": {"type": "text"}, "tools": [],
    },
    TEXT: {"best_of": 1, "n": 1, "user": "a", "stream_options": {"include_obfuscation": False}},
    EMBED: {"encoding_format": "float", "user": "a"},
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    CHAT: {
        "n": 2, "logprobs": True, "top_logprobs": 2, "audio": {"voice": "ash", "format": "wav"},
        "modalities": ["text", "audio"], "functions": [{"name": "f", "parameters": {}}],
        "function_call": "auto", "moderation": {"model": "m"}, "reasoning_effort": "low",
        "service_tier": "flex", "store": True, "verbosity": "low", "tool_choice": "required",
        "web_search_options": {}, "response_format": {"type": "json_schema"},
        "tools": [{"type": "custom", "custom": {"name": "f"}}], "no_such_field": 1,
    },
    TEXT: {"best_of": 2, "n": 2, "logprobs": 1, "suffix": "end", "prompt": ["a", "b"]},
    EMBED: {"dimensions": 100_000, "encoding_format": "hex", "input": [1, 2], "other": 1},
}  # fmt: skip
REFUSED[CHAT]["web_search_options"] = {"search_context_size": "low"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("fields") / "state") as running:
        yield running


def ask(server: Server, path: str, **fields: Any) -> httpx.Response:
    return server.http.post(path, json={**INPUT[path], **fields})


def said(answer: httpx.Response) -> Any:
    [found] = succeeded(answer).get("choices") or succeeded(answer)["data"]
    return found.get("message", {}).get("content") or found.get("text") or found["embedding"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [(path, *item) for path, fields in HARMLESS.items() for item in fields.items()],
)
def test_a_harmless_field_changes_nothing(
    server: Server, path: str, field: str, value: Any
) -> None:
    assert said(ask(server, path, **{field: value})) == said(ask(server, path))


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [(path, *item) for path, fields in REFUSED.items() for item in fields.items()],
)
def test_what_the_server_has_not_is_refused_by_name(
    server: Server, path: str, field: str, value: Any
) -> None:
    answer = ask(server, path, **{field: value})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"].split(".")[0] == field
    assert field in error["message"]


def test_every_field_of_the_openai_package_is_in_the_documents_table() -> None:
    """And none that the package does not know as well."""
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat
    from openai.types.fine_tuning import job_create_params

    page = (Path(__file__).parents[2] / "docs/server.md").read_text()
    table = page.split("### Fields of requests")[1].split("###")[0]
    told = {name for row in table.splitlines() for name in row.split("|")[2:3]}
    told = {name.strip(" `") for cell in told for name in cell.split(",")}
    for params in (
        chat.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsNonStreaming,
        embedding_create_params.EmbeddingCreateParams,
        job_create_params.JobCreateParams,
    ):
        assert set(typing.get_type_hints(params)) <= told


# Completions


def test_echo_puts_the_prompt_before_the_text(server: Server) -> None:
    text = said(ask(server, TEXT))
    assert said(ask(server, TEXT, echo=True)) == "A cow" + text
    streamed = ask(server, TEXT, echo=True, stream=True).text
    assert streamed.index("A cow") < streamed.index("data: [DONE]")


def test_a_prompt_may_be_the_models_tokens(server: Server) -> None:
    from cli_runs import MODEL

    from fwdllm.engine.data.tokenizer import Tokenizer

    ids = Tokenizer.open(MODEL).encode_prompt("A cow")
    text = said(ask(server, TEXT))
    assert said(ask(server, TEXT, prompt=ids)) == said(ask(server, TEXT, prompt=[ids])) == text
    for bad in ([2**30], [-1], []):
        assert error_of(ask(server, TEXT, prompt=bad))["param"].startswith("prompt")


def test_seeds_and_biases_count(server: Server) -> None:
    def hot(seed: int) -> Any:
        return said(ask(server, TEXT, temperature=2, seed=seed, max_tokens=8))

    assert hot(1) == hot(1) != hot(2)
    from cli_runs import MODEL

    from fwdllm.engine.data.tokenizer import Tokenizer

    [token] = Tokenizer.open(MODEL).encode("moon", bos=False)[-1:]
    biased = said(ask(server, TEXT, logit_bias={token: 100}))
    assert biased != said(ask(server, TEXT))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([{"type": "image_url", "image_url": {"url": "data:,"}}], "image_url"),
        ([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}], "input_audio"),
        ([{"type": "file", "file": {"file_id": "a"}}], "file"),
        ([{"type": "refusal", "refusal": "no"}], "refusal"),
        ([{"type": "text"}], "text"),
        (["text"], "object"),
    ],
)
def test_parts_that_are_not_text_are_refused_by_name(
    server: Server, content: Any, what: str
) -> None:
    error = error_of(ask(server, CHAT, messages=[{"role": "user", "content": content}]))
    assert error["param"] == "messages"
    assert what in error["message"]


@pytest.mark.parametrize("field", ["name", "audio", "function_call", "refusal", "weight"])
def test_what_a_template_does_not_show_of_a_message_is_refused(server: Server, field: str) -> None:
    error = error_of(ask(server, CHAT, messages=[{**HELLO[0], field: "x"}]))
    assert error["param"].startswith("messages")
    assert field in error["message"]
    said(ask(server, CHAT, messages=[{**HELLO[0], field: None}]))


# Embeddings


def test_dimensions_are_the_first_ones_of_length_1_again(server: Server) -> None:
    whole = np.array(said(ask(server, EMBED)))
    cut = np.array(said(ask(server, EMBED, dimensions=8)))
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), rtol=1e-6)
    packed = said(ask(server, EMBED, dimensions=8, encoding_format="base64"))
    numbers = struct.unpack("<8f", base64.b64decode(packed))
    np.testing.assert_allclose(numbers, cut, rtol=1e-6)


def test_token_ids_are_not_embedded_as_they_are_of_another_vocabulary(server: Server) -> None:
    for ids in ([1, 2], [[1, 2], [3]]):
        assert "check_embedding_ctx_length" in error_of(ask(server, EMBED, input=ids))["message"]


# Files and jobs


def test_files_do_not_expire(server: Server) -> None:
    expires = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    files = {"file": ("data.jsonl", lines({"text": "x"}))}
    answer = server.http.post("/v1/files", files=files, data={**PURPOSE, **expires})
    assert error_of(answer)["param"] == "expires_after"


def test_a_job_keeps_its_metadata_and_any_suffix_of_64_characters(server: Server) -> None:
    settings = {**SETTINGS, "steps": 1, "warmup": 0}
    metadata = {"team": "docs", "ticket": "42"}
    id = server.create_job(settings, metadata=metadata, suffix="my größter model", integrations=[])
    assert server.job(id)["metadata"] == metadata
    job = server.await_status(id, "succeeded")
    assert job["metadata"] == metadata
    assert job["user_provided_suffix"] == "my größter model"
    assert job["fine_tuned_model"].startswith(f"ft:{NAME}:my-gr-ter-model:")
    assert server.get(f"/v1/models/{job['fine_tuned_model']}")["id"] == job["fine_tuned_model"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("integrations", [{"type": "wandb", "wandb": {"project": "p"}}]),
        ("metadata", {"a": "x" * 513}),
        ("metadata", {"a": 1}),
        ("metadata", {str(i): "" for i in range(17)}),
        ("suffix", "x" * 65),
        ("method", {"type": "dpo"}),
        ("method", {"type": "supervised", "dpo": {}}),
        ("hyperparameters", {"beta": 0.1}),
        ("validation", "file-1"),
    ],
)
def test_what_jobs_have_not_is_refused_by_name(server: Server, field: str, value: Any) -> None:
    body = {"model": NAME, "training_file": server.upload(TRAIN_ROWS), field: value}
    assert error_of(server.http.post(JOBS, json=body))["param"].split(".")[0] == field
