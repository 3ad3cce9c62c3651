"""``fwdllm inspect``: the report agrees with the engine, and its memory with measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runs import MODEL, make_cli
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, quants
from places import SHARED

from fwdllm import Engine, LoRAConfig
from fwdllm.inspect import inspect_model

ENCODER = SHARED / "models" / "minilm-l6-v2.Q4_0.gguf"
WIDTH, HIDDEN, VOCAB = 64, 256, 256


def write_llama(path: Path, down: Type) -> Path:
    """A one-layer llama, ``ffn_down`` of the given type."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("one layer")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{i:02X}>" for i in range(VOCAB)])  # of bytes: llama.cpp needs them
    shapes = {
        "token_embd": (VOCAB, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // 2, WIDTH),
        "blk.0.attn_v": (WIDTH // 2, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.ffn_gate": (HIDDEN, WIDTH),
        "blk.0.ffn_up": (HIDDEN, WIDTH),
        "blk.0.ffn_down": (WIDTH, HIDDEN),
    }
    for name, shape in shapes.items():
        kind = down if name.endswith("ffn_down") else Type.F32
        data = quants.quantize(np.ones(shape, np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_bundled_model() -> None:
    report = inspect_model(MODEL)
    engine = Engine.load(MODEL, LoRAConfig())
    assert engine.adapter is not None
    assert (report["architecture"], report["name"]) == ("llama", "fwdllm-tiny")
    assert report["file_bytes"] == MODEL.stat().st_size
    assert report["shapes"] == {
        "layers": 6,
        "width": 256,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 32,
        "hidden": 704,
        "vocab": 2048,
        "context": 512,
    }
    assert report["n_trainable"] == engine.adapter.theta.size
    types = {entry["type"]: entry for entry in report["tensor_types"]}
    assert {name: entry["count"] for name, entry in types.items()} == {
        "Q4_0": 42,
        "Q8_0": 1,
        "F32": 13,
    }
    assert all(entry["supported"] for entry in types.values())
    assert types["Q8_0"]["bytes"] == 2048 * 256 // 32 * 34
    shapes = engine.backend.linear
    assert {
        f"blk.0.{target['name']}": (target["n_out"], target["n_in"]) for target in report["targets"]
    } == {name: shape for name, shape in shapes.items() if name.startswith("blk.0.")}
    assert {target["layers"] for target in report["targets"]} == {6}
    assert report["n_parameters"] == 2048 * 256 + 13 * 256 + 6 * (
        2 * 256 * 256 + 2 * 128 * 256 + 3 * 704 * 256
    )


@pytest.mark.skipif(not ENCODER.exists(), reason="the shared models are not here")
def test_an_encoder() -> None:
    report = inspect_model(ENCODER)
    assert (report["architecture"], report["shapes"]["kv_heads"]) == ("bert", 12)
    assert [target["name"] for target in report["targets"]] == [
        *("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
    ]
    assert report["step"] == {"batch_size": 8, "tokens": 64, "lanes": 9}
    assert report["step_memory"]["logits"] == report["gradient_memory"]["loss"] == 0


def test_unsupported_types_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_llama(tmp_path / "ternary.gguf", Type.TQ2_0)
    types = {entry["type"]: entry["supported"] for entry in inspect_model(path)["tensor_types"]}
    assert types == {"F32": True, "TQ2_0": False}
    text = make_cli(capfd)("inspect", path).out
    lines = [line.rstrip() for line in text.splitlines()]
    assert any(line.startswith("TQ2_0") and line.endswith("no kernels here") for line in lines)
    assert sum("no kernels here" in line for line in lines) == 1
    assert "one layer" in text
    assert any(line.split() == ["ffn_down", "64", "x", "256", "1"] for line in lines)


def test_json_is_the_report(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = make_cli(capfd)("inspect", MODEL, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.json == inspect_model(MODEL)


def test_float_weights_pack_more(tmp_path: Path) -> None:
    quantized = inspect_model(write_llama(tmp_path / "a.gguf", Type.Q8_0))["step_memory"]
    floats = inspect_model(write_llama(tmp_path / "b.gguf", Type.F32))["step_memory"]
    assert floats["packed"] > 2 * quantized["packed"]
    assert floats["residual"] == quantized["residual"] == 8 * 64 * 9 * WIDTH * 4


# Prints the growth of the peak resident set in a step, and its estimate without what is there
# before: weights, adapter and optimizer.
MEASURE = """
import sys
import numpy as np
from pathlib import Path
from fwdllm import Engine, LoRAConfig
from fwdllm.engine.data.batch import Tokens, pack
from fwdllm.engine.memory.plan import estimate_step

def status(key):
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024

model, n_sequences, length, exact = sys.argv[1], *map(int, sys.argv[2:])
labels = ("a", "b") if "minilm" in model else ()
engine = Engine.load(model, LoRAConfig(), labels=labels, exact=bool(exact))
ids = np.random.default_rng(0).integers(5, 2000, length).tolist()

def step(n, length):
    tokens = Tokens(ids[:length], [True] * length, 0 if labels else None)
    engine.directional_derivatives(pack([tokens] * n), np.arange(8, dtype=np.uint64))

step(1, 2)  # maps the weights, starts the threads
before = status("VmRSS:")
step(n_sequences, length)
encoder = engine.encoder
estimate = estimate_step(
    engine.args,
    weight_bytes=0,
    n_trainable=0,
    n_rows=n_sequences * length,
    n_lanes=9,
    longest=length,
    int8=not exact,
    encoder=encoder,
)
print(status("VmHWM:") - before, estimate["total"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("model", "n_sequences", "length", "exact"),
    [(MODEL, 8, 64, 0), (MODEL, 8, 64, 1), (MODEL, 2, 256, 0), (ENCODER, 8, 64, 0)],
)
def test_the_memory_of_a_step(model: Path, n_sequences: int, length: int, exact: int) -> None:
    if not model.exists():
        pytest.skip("the shared models are not here")
    command = [sys.executable, "-c", MEASURE, *map(str, (model, n_sequences, length, exact))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    measured, estimate = map(int, run.stdout.split())
    # It errs on the safe side: whether the C library gives freed arrays back before the next ones
    # are made depends on what was freed before.
    assert estimate / 2 < measured < estimate * 1.5
