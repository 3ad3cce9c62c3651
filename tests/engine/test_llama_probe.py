"""A llama.cpp that dies, hangs or cannot be loaded, and the door that survives it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import MODEL, QUICK, TRAIN

from fwdllm import LlamaCppError
from fwdllm.engine.errors import FwdllmWarning
from fwdllm.engine.llamacpp import native as llama_native
from fwdllm.engine.llamacpp import probe as llama_probe
from fwdllm.engine.llamacpp.probe import BROKEN, FULL, PLAIN, VOCABULARY, Verdict
from fwdllm.kernels import machine

PROMPT = "Question: What do cats like?\nAnswer:"
SLOWER = "fwdllm: llama.cpp runs without its fastest kernels"
GENERATE = ("generate", MODEL, PROMPT, "--max-tokens", 4)


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload; see dying_llama.c."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler, or not Linux: nothing to preload")
    library = tmp_path_factory.mktemp("dying") / "dying_llama.so"
    source = Path(__file__).with_name("dying_llama.c")
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of answers, a new one; processes of the test use it, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fwdllm" / "llama-cpp.json"


def ask_anew(monkeypatch: pytest.MonkeyPatch) -> Verdict:
    """The verdict of a process that has just started."""
    monkeypatch.setattr(llama_probe, "_found", None)
    return llama_probe.verdict()


def use(monkeypatch: pytest.MonkeyPatch, library: Path, mode: str) -> None:
    """Let processes of the test have a llama.cpp that dies."""
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FWDLLM_TEST_LLAMA", mode)


def fwdllm(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "fwdllm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.fixture(scope="module")
def usual() -> Verdict:
    """What works here: everything, but for AMX in a llama.cpp that GCC built (see REBUILD)."""
    found, certain = llama_probe.probe()
    assert certain
    if "amx_tile" not in machine.processor()["flags"].split():
        assert found == Verdict(FULL, "")
    return found


def warning(usual: Verdict) -> str:
    """What a command says of it, the beginning of a line."""
    return SLOWER if usual.state == PLAIN else ""


def test_it_works_here(usual: Verdict) -> None:
    assert usual.state in (FULL, PLAIN)


def test_without_extra_buffers_where_they_die(
    cache: Path, dying: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, usual: Verdict
) -> None:
    if not {"avx2", "asimddp"} & set(machine.processor()["flags"].split()):
        pytest.skip("llama.cpp repacks no weights for this processor")
    healthy = fwdllm(*GENERATE)
    assert healthy.returncode == 0
    assert healthy.stderr[: len(SLOWER)] == warning(usual)
    cache.unlink()
    adapter = tmp_path / "adapter.gguf"
    use(monkeypatch, dying, "extra")
    assert fwdllm("tune", MODEL, TRAIN, *QUICK, "-o", adapter, folder=tmp_path).returncode == 0
    assert fwdllm(*GENERATE, "--adapter", adapter).returncode == 0
    cache.unlink()
    for _ in range(2):  # found out, remembered
        done = fwdllm(*GENERATE)
        assert done.returncode == 0
        assert done.stdout == healthy.stdout
        assert done.stderr.startswith(SLOWER)
        assert done.stderr.count("\n") == 1
        assert "Segmentation fault" in done.stderr
        assert "CC=clang" in done.stderr
        (answer,) = json.loads(cache.read_text()).values()
        assert answer == {"state": PLAIN, "reason": "Segmentation fault"}


def test_where_all_computing_dies_vocabularies_are_still_read(
    cache: Path, dying: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Our own graphs go on; llama.cpp's computing is refused in one sentence."""
    use(monkeypatch, dying, "always")
    adapter = tmp_path / "adapter.gguf"
    tuned = fwdllm("tune", MODEL, TRAIN, *QUICK, "-o", adapter, folder=tmp_path)
    assert tuned.returncode == 0, tuned.stderr
    assert adapter.exists()
    for command in (GENERATE, ("eval", MODEL, TRAIN, "--backend", "llama.cpp")):
        done = fwdllm(*command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("fwdllm: llama.cpp's kernels fail on this processor (Segm")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "reason"), [("hang", "no end after 5 s"), ("abort", "Aborted"), ("always", "Segm")]
)
def test_only_what_is_certain_is_remembered(
    cache: Path, dying: Path, monkeypatch: pytest.MonkeyPatch, mode: str, reason: str
) -> None:
    use(monkeypatch, dying, mode)
    found, certain = llama_probe.probe(time_limit=5)
    assert found.state == VOCABULARY
    assert found.reason.startswith(reason)
    assert certain == (mode == "always")


@pytest.mark.parametrize("content", [None, b"", b"not a library"], ids=["none", "empty", "text"])
def test_a_library_that_cannot_be_loaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    folder = tmp_path / "lib"
    folder.mkdir()
    if content is not None:
        (folder / "libllama.so").write_bytes(content)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(folder))
    for command in (GENERATE, ("tune", MODEL, TRAIN, *QUICK), ("serve", MODEL, "--port", 0)):
        done = fwdllm(*command, folder=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("fwdllm: llama.cpp cannot be used here: ")
        assert done.stderr.count("\n") == 1
    assert not cache.exists()
    report = fwdllm("doctor", "--json")
    assert report.returncode == 1
    assert json.loads(report.stdout)["llama_cpp"]["state"] == BROKEN
    assert fwdllm("doctor").returncode == 1


def test_a_second_start_reads_the_answer(
    cache: Path, monkeypatch: pytest.MonkeyPatch, usual: Verdict
) -> None:
    assert ask_anew(monkeypatch) == usual
    monkeypatch.setattr(llama_probe, "probe", lambda: pytest.fail("probed again"))
    assert ask_anew(monkeypatch) == usual


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\udcff",
        '{"%s": 1}',
        '{"%s": {"state": "full"}}',
        '{"%s": {"state": "unheard", "reason": ""}}',
        '{"%s": {"state": "full", "reason": 0}}',
        '{"%s": {"state": ["full"], "reason": ""}}',
    ],
)
def test_a_damaged_cache_is_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    cache.parent.mkdir(parents=True)
    text = content.replace("%s", llama_probe.key())
    cache.write_bytes(text.encode("utf-8", "surrogateescape"))
    answer = (Verdict(FULL, "found out"), True)
    monkeypatch.setattr(llama_probe, "probe", lambda: answer)
    assert ask_anew(monkeypatch) == answer[0]
    assert llama_probe._recall() == answer[0]  # and mended


@pytest.mark.parametrize("obstacle", ["a file in the way", "a folder in its place"])
def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str, usual: Verdict
) -> None:
    root = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    if obstacle == "a file in the way":
        root.write_text("")
    else:
        machine.cache_file("llama-cpp.json").mkdir(parents=True)
    assert fwdllm(*GENERATE).stderr[: len(SLOWER)] == warning(usual)
    left = {path.name for path in root.rglob("*") if path.is_file()}
    assert left <= {"instruction-set.json"}  # of our own kernels


def test_another_build_or_processor_is_tried_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libllama.so"
    library.write_bytes(b"one")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    keys = [llama_probe.key()]
    assert llama_probe.key() == keys[0]
    os.utime(library, ns=(1, 1))
    keys.append(llama_probe.key())
    monkeypatch.setattr(llama_probe, "processor", lambda: {"name": "another", "flags": "amx_int8"})
    keys.append(llama_probe.key())
    assert len(set(keys)) == 3


def test_a_program_that_is_not_python_tries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen one would start itself; it goes the safe way."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    found, certain = llama_probe.probe()
    assert (found.state, certain) == (PLAIN, False)


@pytest.mark.parametrize("state", [FULL, PLAIN])
def test_every_way_to_open_a_model_asks(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    asked: list[bool] = []
    original = llama_native.call

    def call(function: object, *args: object) -> object:
        if function is llama_native.llama_cpp.llama_model_load_from_file:
            asked.append(args[1].use_extra_bufts)  # type: ignore[attr-defined]
        return original(function, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(llama_native, "call", call)
    monkeypatch.setattr(llama_probe, "verdict", lambda: Verdict(state, "a trial"))
    monkeypatch.setattr(llama_native, "_say_slower", lambda why: None)
    llama_native.open_model(MODEL, vocab_only=False)
    llama = llama_native.Llama(str(MODEL), n_ctx=16, verbose=False)
    asked.append(llama.model_params.use_extra_bufts)
    llama.close()
    assert asked == [state == FULL] * 2


def test_where_it_cannot_compute_python_gets_a_typed_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llama_probe, "verdict", lambda: Verdict(VOCABULARY, "Illegal instruction"))
    llama_native.open_model(MODEL, vocab_only=True)
    for open in (
        lambda: llama_native.open_model(MODEL, vocab_only=False),
        lambda: llama_native.Llama(str(MODEL), verbose=False),
    ):
        with pytest.raises(LlamaCppError, match="Illegal instruction"):
            open()


def test_an_option_that_llama_cpp_does_not_have_is_refused() -> None:
    model = llama_native.open_model(MODEL, vocab_only=False)
    with pytest.raises(LlamaCppError, match="has no n_context in llama_context_params"):
        llama_native.open_context(model, n_context=16)


def test_the_slower_way_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_probe, "verdict", lambda: Verdict(PLAIN, "Segmentation fault"))
    llama_native._say_slower.cache_clear()
    with pytest.warns(FwdllmWarning, match="without its fastest kernels") as caught:
        _ = [llama_native.open_model(MODEL, vocab_only=False) for _ in range(2)]
    llama_native._say_slower.cache_clear()
    assert len(caught) == 1
