"""Every setting by every way it can be given: command line, HTTP, Python, files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_runs import MODEL, Cli, make_cli, pirate_rows, write_rows
from typer.testing import CliRunner

from fwdllm.cli.federation import parse_settings
from fwdllm.cli.options import given, takes
from fwdllm.cli.settings_file import read_settings
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import DirectionsConfig, LoRAConfig, settings_of, types_of
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.presets import preset

TABLES: dict[str, type] = {
    "train": TrainConfig,
    "lora": LoRAConfig,
    "directions": DirectionsConfig,
    "federation": FederationConfig,
}
TUNE = ("train", "lora", "directions")
# What no rule below would find.
SPECIAL: dict[str, Any] = {
    "targets": ("attn_k", "ffn_up"),
    "layers": (0, 3),
    "quorum": 0.25,
    "trim": 0.25,
    "delta": 0.25,
    "keep": 0.25,
}


def value_of(config: type, name: str) -> Any:
    """A value that is allowed and not the default."""
    known, (kind, _) = settings_of(config)[name], types_of(config)[name]
    default = next(f.default for f in dataclasses.fields(config) if f.name == name)
    if name in SPECIAL:
        return SPECIAL[name]
    if kind is bool:
        return not default
    if known.choices:
        return next(choice for choice in reversed(known.choices) if choice != default)
    if kind is str:  # the kinds of directions
        return "subzero"
    if kind is float:
        return 0.625 if known.high <= 1 else 1.25
    return max(3, int(known.low)) if default != 3 else 4


ALL = [(table, name) for table, config in TABLES.items() for name in settings_of(config)]
# A job's seed is a field of OpenAI's request.
OF_A_JOB = [(table, name) for table, name in ALL if table in TUNE and name != "seed"]


@pytest.fixture(params=ALL, ids=".".join)
def setting(request: pytest.FixtureRequest) -> tuple[str, type, str, Any]:
    table, name = request.param
    return table, TABLES[table], name, value_of(TABLES[table], name)


def test_all_fields_are_settings() -> None:
    for config in TABLES.values():
        fields = {field.name for field in dataclasses.fields(config)}
        assert fields - set(settings_of(config)) <= {"scope"}


def test_by_the_command_line(setting: tuple[str, type, str, Any]) -> None:
    table, config, name, value = setting
    found: dict[str, Any] = {}
    if table == "federation":
        found = parse_settings([f"{name}={json.dumps(value)}"])
        assert found == {name: value}
        return
    app = typer.Typer()

    @app.command()
    @takes(TrainConfig, LoRAConfig, DirectionsConfig)
    def command(*, first: bool = False, **settings: Any) -> None:
        found.update(given(config, settings))

    flags = settings_of(config)[name].flags or (f"--{name.replace('_', '-')}",)
    text = [",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    for flag in flags:
        done = CliRunner().invoke(app, [flag, *([] if value is True else text)])
        assert done.exit_code == 0, done.output
        assert found == {name: value}
        assert type(found[name]) is type(value)


@pytest.mark.parametrize(("table", "name"), OF_A_JOB, ids=[".".join(each) for each in OF_A_JOB])
def test_by_http(table: str, name: str) -> None:
    from fwdllm.http.fine_tuning import JobRequest

    config = TABLES[table]
    value = value_of(config, name)
    key = "directions" if name == "kind" else name
    body = {"model": "m", "training_file": "f", "fwdllm": {key: value}}
    request = JobRequest.model_validate(json.loads(json.dumps(body)))
    assert request.fwdllm.of(config) == {name: value}


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_by_a_file(setting: tuple[str, type, str, Any], suffix: str, tmp_path: Path) -> None:
    table, config, name, value = setting
    path = tmp_path / f"run{suffix}"
    text = json.dumps({table: {name: value}})
    path.write_text(text if suffix == ".json" else f"[{table}]\n{name} = {json.dumps(value)}\n")
    assert read_settings(path, **{table: config}) == {table: {name: value}}


def test_by_python(setting: tuple[str, type, str, Any]) -> None:
    table, config, name, value = setting
    needed = {"train": {"steps": 100}, "federation": {"rounds": 100}}.get(table, {})
    # Settings that have a meaning in the company of others only.
    if table == "federation":
        with_it = {"upload": {"local_steps": 3}, "local_steps": {"upload": "steps"}}
        needed |= with_it.get(name, {})
        needed |= {"seeds": "shared"} if name in ("aggregate", "sigma", "secure") else {}
        needed |= {"weighted": False} if name == "sigma" else {}
        needed |= {"upload": "weights", "local_steps": 3} if name == "client_optimizer" else {}
        needed |= {"upload": "steps", "local_steps": 3} if name == "seeds" else {}
        assert getattr(preset("fedavg", **{**PLAIN, **needed, name: value}), name) == value
    else:
        assert getattr(config(**{**needed, name: value}), name) == value


# The preset's own settings put back, so that one at a time can be another.
PLAIN = {
    field.name: field.default
    for field in dataclasses.fields(FederationConfig)
    if field.default is not dataclasses.MISSING
}


def test_what_a_run_recorded_can_be_given_back(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run: Cli = make_cli(capfd)
    data = write_rows(tmp_path / "data.jsonl", pirate_rows(12))
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    options = ["--steps", "3", "--batch-size", "2", "--optimizer", "adamw"]
    options += ["--weight-decay", "0.5", "--rank", "2", "--alpha", "3", "--layers", "1-2"]
    options += ["--directions", "subzero", "--dimension", "4", "--held-out", "3"]
    assert run("tune", MODEL, data, "-o", first, *options).code == 0
    recorded = tmp_path / "a.run" / "config.json"
    done = run("tune", MODEL, data, "-o", second, "--config", recorded, "--held-out", "3")
    assert done.code == 0, done.err
    assert second.read_bytes() == first.read_bytes()
    again, before = (
        json.loads((tmp_path / run / "config.json").read_text()) for run in ("b.run", "a.run")
    )
    assert again.pop("started") >= before.pop("started")
    assert again == before
    assert again["train"]["weight_decay"] == 0.5
    done = run("tune", MODEL, data, "-o", tmp_path / "d.gguf", "--config", recorded, "--exact")
    assert (done.code, "the run had exact False, not True" in done.err) == (2, True)
    # An option wins over the file.
    third = tmp_path / "c.gguf"
    done = run("tune", MODEL, data, "-o", third, "--config", recorded, "--rank", "1")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "c.run" / "config.json").read_text())["lora"]["rank"] == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[training]\nsteps = 3\n", "tables are train; there is no [training]"),
        ("steps = 3\n", "tables are train; there is no [steps]"),
        ("[train]\nstep = 3\n", "there is no setting train.step"),
        ("[train\n", "is no file of settings"),
    ],
)
def test_what_a_file_cannot_say(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_settings(path, train=TrainConfig)
    assert sentence in str(error.value)
    with pytest.raises(ConfigError, match="cannot read"):
        read_settings(tmp_path / "none.toml", train=TrainConfig)
