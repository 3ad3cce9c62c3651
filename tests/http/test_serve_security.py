"""Who may ask the server, what it lets others see, and what it leaves on the disk."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import NAME, PURPOSE, SETTINGS, TRAIN_ROWS, Server, error_of, lines, serve_command

posix = pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")

KEY = "sk-a-key-that-nobody-guesses"
OPEN = ("/", "/assets/app.js", "/assets/style.css", "/healthz")
CLOSED = (
    "/v1/models", "/v1/files", "/v1/fine_tuning/jobs", "/v1/adapters", "/v1/server", "/v1/runs",
    "/v1/stream", "/metrics", "/openapi.json", "/v1/no/such/path",
)  # fmt: skip
TRICKS = (
    "//v1/models", "/assets/../v1/models", "/healthz/../v1/models", "/assets/..%2fv1%2fmodels",
    "/%76%31/models", "/V1/models", "/healthz/", "/v1/models/", "/assets//v1/models",
)  # fmt: skip
# Words of prompts and files, which are nobody else's business.
SECRET = "xylophone-zeppelin"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("open") / "state") as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    state = tmp_path_factory.mktemp("guarded") / "state"
    with Server(state, "--api-key", KEY, key=KEY) as running:
        yield running


def said(server: Server, request: bytes) -> tuple[int, bytes]:
    """Status and all of the answer to the bytes of a request."""
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return int(answer.split()[1]), answer


# Where requests come from


def host(server: Server, name: str) -> str:
    """This name for Host, with the port of the server."""
    return f"{name}:{server.url.rsplit(':', 1)[1]}"


@pytest.mark.parametrize(
    "name", ["example.com", "localhost.example.com", "127.0.0.1.nip.io", "", "a b", "1"]
)
@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/models", "/metrics", "/assets/app.js"])
def test_a_name_of_another_machine_is_refused(server: Server, name: str, path: str) -> None:
    for value in (name, host(server, name)):
        answer = server.http.get(path, headers={"Host": value})
        error_of(answer)
        assert answer.status_code == 403


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", "192.168.1.5"])
def test_names_that_nobody_can_rebind_are_allowed(server: Server, name: str) -> None:
    for value in (name, host(server, name)):
        assert server.http.get("/v1/models", headers={"Host": value}).status_code == 200


def test_a_request_must_have_one_host(server: Server) -> None:
    good = host(server, "localhost").encode()
    for hosts in (
        b"",
        b"Host: " + good + b"\r\nHost: example.com\r\n",
        b"Host: example.com\r\nHost: " + good + b"\r\n",
        b"Host: " + good + b"\r\nHost: " + good + b"\r\n",
    ):
        request = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n" + hosts + b"\r\n"
        status, _ = said(server, request)
        assert status in (400, 403), hosts
    request = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: " + good + b"\r\n\r\n"
    assert said(server, request)[0] == 200


@pytest.mark.parametrize(
    "origin",
    ["https://example.com", "null", "", "http://localhost", "http://127.0.0.1:1", "file://"],
)
def test_a_page_of_another_site_is_refused(server: Server, origin: str) -> None:
    headers = {"Origin": origin}
    for answer in (
        server.http.get("/v1/models", headers=headers),
        server.http.post("/v1/embeddings", headers=headers, json={"input": "x"}),
        server.http.options("/v1/embeddings", headers=headers),
    ):
        error_of(answer)
        assert answer.status_code == 403


def test_the_page_of_the_server_is_allowed_and_nobody_by_cors(server: Server) -> None:
    headers = {"Origin": server.url}
    for answer in (
        server.http.get("/v1/models", headers=headers),
        server.http.post("/v1/embeddings", headers=headers, json={"input": "x"}),
    ):
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = server.http.options(
        "/v1/embeddings", headers={**headers, "Access-Control-Request-Method": "POST"}
    )
    assert not [name for name in preflight.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/assets/app.js", "/v1/models", "/metrics", "/nope"])
def test_answers_have_headers_that_bind_browsers(server: Server, path: str) -> None:
    for headers in ({}, {"Host": "example.com"}):
        found = server.http.get(path, headers=headers).headers
        policy = found["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert found["x-content-type-options"] == "nosniff"
        assert found["referrer-policy"] == "no-referrer"
        assert found["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in found


# The key


@pytest.mark.parametrize("path", OPEN)
def test_what_a_page_needs_before_its_key_is_open(guarded: Server, path: str) -> None:
    assert httpx.get(guarded.url + path).status_code == 200


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY],
)
def test_without_the_key_all_else_is_closed(
    guarded: Server, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = httpx.get(guarded.url + path, headers=headers)
    assert answer.status_code == 401
    assert error_of(answer)["code"] == "invalid_api_key"
    assert KEY not in answer.text


def test_tricks_with_the_path_do_not_open_it(guarded: Server) -> None:
    for path in TRICKS:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        status, answer = said(guarded, request.encode())
        assert status in (307, 401, 404), path
        assert NAME.encode() not in answer


def test_with_the_key_all_is_open(guarded: Server) -> None:
    for path in CLOSED:
        if path not in ("/v1/stream", "/v1/no/such/path"):
            assert guarded.http.get(path).status_code == 200
    lower = httpx.get(guarded.url + "/v1/models", headers={"Authorization": f"bearer {KEY}"})
    assert lower.status_code == 200


def test_a_key_may_come_from_the_environment(tmp_path: Path) -> None:
    """So that it does not show in the list of processes."""
    environment = {"FWDLLM_API_KEY": KEY}
    with Server(tmp_path / "state", environment=environment, key=KEY) as server:
        assert httpx.get(server.url + "/v1/models").status_code == 401
        assert server.http.get("/v1/models").status_code == 200


# Starting


def failed(*arguments: object, environment: Mapping[str, str] | None = None) -> str:
    """What a server that cannot start says, in one sentence."""
    done = subprocess.run(
        serve_command(*arguments),  # type: ignore[arg-type]
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "", "192.168.1.5", "example.com"])
def test_others_are_not_let_in_without_a_key(tmp_path: Path, address: str) -> None:
    text = failed(tmp_path / "state", "--host", address)
    assert "--api-key" in text
    assert not (tmp_path / "state").exists()


def test_others_are_let_in_with_a_key(tmp_path: Path) -> None:
    with Server(tmp_path / "state", "--host", "0.0.0.0", "--api-key", KEY, key=KEY) as server:
        port = server.url.rsplit(":", 1)[1]
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/models")
        assert answer.status_code == 401


def test_an_empty_key_is_refused(tmp_path: Path) -> None:
    assert "key" in failed(tmp_path / "state", "--api-key", " ")


def test_a_folder_has_one_server(server: Server) -> None:
    text = failed(server.state)
    assert "use" in text
    assert server.get("/healthz")


def test_a_port_that_is_taken_is_refused(server: Server, tmp_path: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    assert port in failed(tmp_path / "state", "--port", port)


# What is left where


def test_secrets_are_not_written_to_the_log(guarded: Server) -> None:
    chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
    guarded.post("/v1/chat/completions", chat)
    guarded.post("/v1/embeddings", {"input": SECRET})
    file = guarded.upload(lines({"text": SECRET}, {"text": "b"}), f"{SECRET}.jsonl")
    bad = {"file": (f"{SECRET}.jsonl", f'{{"text": "{SECRET}'.encode())}
    error_of(guarded.http.post("/v1/files", files=bad, data=PURPOSE))
    error_of(guarded.http.post("/v1/completions", json={"prompt": {SECRET: SECRET}}))
    error_of(guarded.http.post("/v1/completions", content=f'{{"prompt": "{SECRET}"'))
    error_of(guarded.http.post("/v1/completions", json={"prompt": f"{SECRET} " * 500}))
    error_of(guarded.http.get("/v1/files", params={"limit": SECRET}, headers={"Host": SECRET}))
    error_of(guarded.http.get(f"/v1/models/{SECRET}"))
    httpx.get(guarded.url + "/v1/models", headers={"Authorization": f"Bearer {SECRET}"})
    id = guarded.create_job({**SETTINGS, "steps": 1, "warmup": 0}, training_file=file)
    guarded.await_status(id, "succeeded", "failed")
    assert SECRET not in guarded.output
    assert KEY not in guarded.output


NAMES = (
    "../../etc/passwd",
    "..\\..\\windows.jsonl",
    "/etc/cron.d/evil",
    "a\0b.jsonl",
    "line\nbreak.jsonl",
    "x" * 5000 + ".jsonl",
    "",
    ".",
    "..",
    "‮gpj.lnosj",
    'quote".jsonl',
)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_lead_nowhere(server: Server, name: str) -> None:
    before = all_files(server.state.parent)
    head = f'Content-Disposition: form-data; name="file"; filename="{name}"'
    body = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\n'
        + head.encode()
        + b"\r\n\r\n"
        + TRAIN_ROWS
        + b"\r\n--b--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = server.http.post("/v1/files", content=body, headers=headers)
    assert all_files(server.state.parent) == before
    if answer.status_code != 200:
        error_of(answer)
        return
    file = answer.json()
    assert len(file["filename"]) <= 255
    assert file["filename"].isprintable()
    assert not {"/", "\\", "\0"} & set(file["filename"])
    assert server.http.get(f"/v1/files/{file['id']}/content").content == TRAIN_ROWS
    assert server.http.delete(f"/v1/files/{file['id']}").status_code == 200


def all_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_downloads_name_is_harmless(server: Server) -> None:
    made = server.post("/v1/adapters", {"rank": 1, "suffix": "..-.."})
    answer = server.http.get(f"/v1/adapters/{made['id']}/content")
    [name] = answer.headers["content-disposition"].split("filename=")[1:]
    assert not {"/", "\\", ":", ";"} & set(name)


@posix
def test_the_folder_and_all_in_it_are_private(server: Server) -> None:
    id = server.create_job({**SETTINGS, "steps": 4, "warmup": 0, "checkpoint_every": 1})
    server.await_step(id, 2)
    assert mode(server.state) == 0o700
    databases = [path for path in server.state.iterdir() if "sqlite" in path.name]
    assert databases
    assert {mode(path) for path in databases} == {0o600}
    server.await_status(id, "succeeded")


@posix
def test_a_folder_that_others_can_enter_shows_them_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    state.chmod(0o755)
    with Server(state) as server:
        server.upload(TRAIN_ROWS)
        id = server.create_job({**SETTINGS, "steps": 500})
        server.await_step(id, 1)
        if mode(state) & 0o077:
            readable = [path for path in state.rglob("*.jsonl") if exposed(state, path)]
            assert not readable
        assert not mode(state / "server.sqlite") & 0o077


def exposed(top: Path, path: Path) -> bool:
    """Whether others can read a file, through every folder up to the top."""
    folders = [folder for folder in path.parents if top in folder.parents]
    return bool(mode(path) & 0o004 and all(mode(folder) & 0o001 for folder in folders))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Metrics


def metrics(server: Server) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = server.http.get("/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_requests_by_route(server: Server) -> None:
    def count(status: int) -> float:
        labels = {"method": "GET", "route": "/v1/models/{model}", "status": str(status)}
        return metrics(server).get(("fwdllm_http_requests_total", frozenset(labels.items())), 0)

    found, missing = count(200), count(404)
    server.get(f"/v1/models/{NAME}")
    for name in ("nope", SECRET):
        server.http.get(f"/v1/models/{name}")
    assert (count(200), count(404)) == (found + 1, missing + 2)
    # Nobody can make it grow by asking for names.
    assert SECRET not in server.http.get("/metrics").text


def test_metrics_tell_tokens_jobs_and_memory(server: Server) -> None:
    def value(name: str, **labels: str) -> float:
        return metrics(server)[name, frozenset(labels.items())]

    before = value("fwdllm_generated_tokens_total")
    body: dict[str, Any] = {"prompt": "A cow", "max_tokens": 3, "temperature": 0}
    n = server.post("/v1/completions", body)["usage"]["completion_tokens"]
    assert value("fwdllm_generated_tokens_total") == before + n
    assert value("fwdllm_resident_bytes") > 2**20
    assert value("fwdllm_waiting_requests") == 0
    assert value("fwdllm_jobs", status="queued") == 0
    assert json.loads(server.http.get("/openapi.json").text)["openapi"].startswith("3.")
