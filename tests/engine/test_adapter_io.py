"""GGUF adapters, and what both file formats share: exact round trips and refusals."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import gguf_bytes
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf_bytes import tensor
from places import SHARED
from small_adapters import WIDTH, load, random_adapter, save, shapes

from fwdllm.engine import Engine
from fwdllm.engine.adapters.adapter import Adapter, Head
from fwdllm.engine.adapters.io import check_gguf_adapter, save_gguf
from fwdllm.engine.errors import AdapterError, ConfigError, FwdllmError, NumericsError
from fwdllm.engine.llamacpp.generation import logits
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import reference

TINYMIX = SHARED / "models" / "tinymix-6m.Q4_0.gguf"
HEAD = Head(("negative", "positiv\u00e4"), WIDTH)
CONFIGS = [
    LoRAConfig(rank=1, alpha=0.1),
    LoRAConfig(rank=3, alpha=16, targets=("ffn_down", "attn_k", "attn_q", "attn_output")),
    LoRAConfig(rank=2, alpha=4, targets=("ffn_up", "attn_v"), layers=(0, 2)),
]


def assert_same(found: Adapter, wanted: Adapter) -> None:
    assert found.theta.tobytes() == wanted.theta.tobytes()
    assert (found.targets, found.config) == (wanted.targets, wanted.config)
    assert (found.head, found.architecture) == (wanted.head, wanted.architecture)


@pytest.mark.parametrize("name", ["a.gguf", "peft"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "bert"])
@pytest.mark.parametrize("head", [None, HEAD], ids=["plain", "head"])
@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_is_exact(
    tmp_path: Path, name: str, architecture: str, head: Head | None, config: LoRAConfig
) -> None:
    adapter = random_adapter(config, architecture, head)
    assert_same(load(save(adapter, tmp_path / name), architecture), adapter)


@pytest.mark.parametrize("name", ["a.gguf", "peft"])
def test_equal_adapters_give_equal_bytes(tmp_path: Path, name: str) -> None:
    contents = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = save(random_adapter(head=HEAD), tmp_path / folder / name)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


def test_adapter_saves_itself(tmp_path: Path) -> None:
    adapter = random_adapter()
    save_gguf(adapter, tmp_path / "a.gguf")
    assert_same(load(tmp_path / "a.gguf"), adapter)


def test_saving_again_drops_the_head_of_the_adapter_before(tmp_path: Path) -> None:
    save(random_adapter(head=HEAD), tmp_path / "peft")
    save(random_adapter(), tmp_path / "peft")
    assert load(tmp_path / "peft").head is None


@pytest.mark.parametrize("name", ["a.gguf", "peft"])
def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, name: str) -> None:
    adapter = random_adapter()
    adapter.theta[7] = np.nan
    with pytest.raises(NumericsError):
        save(adapter, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        save(random_adapter(), tmp_path / "missing" / "peft")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        save(random_adapter(), tmp_path / "file")


def test_gguf_as_another_reader_sees_it(tmp_path: Path) -> None:
    adapter = random_adapter(LoRAConfig(rank=2, alpha=3, targets=("attn_k",)), head=HEAD)
    reader = GGUFReader(save(adapter, tmp_path / "a.gguf"))
    assert {key: field.contents() for key, field in reader.fields.items()} == {
        "GGUF.version": 3,
        "GGUF.tensor_count": 6,
        "GGUF.kv_count": 8,
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 3.0,
        "fwdllm.layout_version": 1,
        "fwdllm.head.labels": list(HEAD.labels),
        "fwdllm.head.weight": adapter.theta[-34:-2].tolist(),
        "fwdllm.head.bias": adapter.theta[-2:].tolist(),
    }
    found = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors}
    assert found == {  # GGUF lists the fastest dimension first
        f"blk.{layer}.attn_k.weight.lora_{half}": ("F32", shape)
        for layer in range(3)
        for half, shape in (("a", [16, 2]), ("b", [2, 8]))
    }


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    alpha: float | None = 8.0,
    **metadata: str,
) -> Path:
    strings = {"general.type": "adapter", "adapter.type": "lora", **metadata}
    writer = GGUFWriter(path, strings.pop("general.architecture", "llama"))
    for key, value in strings.items():
        writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name: str, rank: int = 4, n_out: int = 16, n_in: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(name))
    return {
        f"{name}.weight.lora_a": rng.standard_normal((rank, n_in)).astype(np.float16),
        f"{name}.weight.lora_b": rng.standard_normal((n_out, rank)).astype(np.float32),
    }


def test_gguf_by_others(tmp_path: Path) -> None:
    norm = {"blk.0.attn_norm.weight": np.ones(16, np.float32)}  # llama.cpp ignores it too
    factors = pair("blk.1.attn_q") | pair("blk.2.attn_q")
    adapter = load(write_gguf(tmp_path / "a.gguf", factors | norm, alpha=12.0))
    assert adapter.config == LoRAConfig(4, 12.0, ("attn_q",), (1, 2))
    wanted = np.concatenate([array.ravel() for array in factors.values()])
    np.testing.assert_array_equal(adapter.theta, wanted)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_gguf_without_alpha_has_scale_one(tmp_path: Path, alpha: float | None) -> None:
    adapter = load(write_gguf(tmp_path / "a.gguf", pair("blk.0.attn_q"), alpha))
    assert adapter.config.scale == 1.0


Q = pair("blk.0.attn_q")
NAN = {name: np.full_like(array, np.nan) for name, array in Q.items()}


@pytest.mark.parametrize(
    ("tensors", "options", "told"),
    [
        (Q, {"general.architecture": "qwen2"}, "'qwen2' models, but this model is 'llama'"),
        (Q, {"general.type": "model"}, "not an adapter"),
        (Q, {"adapter.type": "control_vector"}, "not a LoRA adapter"),
        (Q, {"alpha": -4.0}, "alpha"),
        (Q, {"alpha": float("nan")}, "alpha"),
        ({}, {}, "no LoRA tensors"),
        (pair("blk.9.attn_q"), {}, "blk.9.attn_q.*another model"),
        (pair("token_embd"), {}, "adapts the embedding"),
        (pair("blk.0.attn_q", n_in=32), {}, "16 x 32, but it is 16 x 16"),
        (pair("blk.0.attn_q", n_out=8), {}, "8 x 16, but it is 16 x 16"),
        (Q | pair("blk.1.attn_q", rank=2), {}, r"mixes ranks \(2, 4\)"),
        (Q | pair("blk.1.attn_k", n_out=8), {}, "attn_[qk] in some layers"),
        ({k: v for k, v in Q.items() if k.endswith("a")}, {}, "lacks 'blk.0.attn_q.weight.lora_b"),
        (Q | {"blk.0.attn_q.weight.lora_b": np.ones((16, 3), np.float32)}, {}, "ranks 4 and 3"),
        (Q | {"blk.0.attn_q.weight.lora_b": np.ones(64, np.float32)}, {}, "ranks 4 and 64"),
        (Q | {"blk.0.attn_q.bias": np.ones(16, np.float32)}, {}, "not a LoRA tensor"),
        (NAN, {}, "not finite"),
    ],
)
def test_gguf_that_does_not_fit(
    tmp_path: Path, tensors: dict[str, np.ndarray], options: dict, told: str
) -> None:
    path = write_gguf(tmp_path / "a.gguf", tensors, **options)
    with pytest.raises(AdapterError, match=told):
        load(path)
    if "mixes ranks" not in told and "some layers" not in told:  # those llama.cpp can apply
        with pytest.raises(AdapterError, match=told):
            check_gguf_adapter(path, "llama", shapes())


def test_gguf_whose_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    """A small file must not be able to ask for much memory."""
    path = write_gguf(tmp_path / "a.gguf", pair("blk.0.attn_q", rank=400))
    content = path.read_bytes()
    place = content.index(b"lora_b") + 6 + 4 + 16 + 4  # after it: n_dims, the shape, the type
    n_bytes_of_a = int.from_bytes(content[place : place + 8], "little")
    assert n_bytes_of_a == 400 * 16 * 2
    content = content[:place] + bytes(8) + content[place + 8 :]
    path.write_bytes(content[:-n_bytes_of_a])
    with pytest.raises(AdapterError, match="overlap"):
        load(path)


def field(key: str, type: int, value: bytes) -> bytes:
    return gguf_bytes.pair(key, type, value)


def small_gguf(*fields: bytes, name: str = "blk.0.attn_q.weight.lora_a") -> bytes:
    """An adapter of rank 1, byte by byte."""
    string, text = gguf_bytes.STRING, gguf_bytes.text
    own = (
        field("general.architecture", string, text("llama")),
        field("general.type", string, text("adapter")),
        field("adapter.type", string, text("lora")),
    )
    tensors = (tensor(name, (16, 1)), tensor("blk.0.attn_q.weight.lora_b", (1, 16), 0, 64))
    return gguf_bytes.gguf(own + fields, tensors, data=bytes(128))


@pytest.mark.parametrize("key", ["general.architecture", "general.type", "adapter.type"])
def test_an_array_for_a_string(tmp_path: Path, key: str) -> None:
    array = gguf_bytes.array(gguf_bytes.U8, 2, b"\0\1")
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes.gguf((field(key, gguf_bytes.ARRAY, array),)))
    with pytest.raises(AdapterError, match=f"'{key}' is of type ndarray"):
        check_gguf_adapter(path, "llama", shapes())


WRONG = {
    "alpha of 64 bits": field("adapter.lora.alpha", 12, struct.pack("<d", 16)),
    "whole alpha": field("adapter.lora.alpha", gguf_bytes.U32, struct.pack("<I", 16)),
    "alpha in words": field("adapter.lora.alpha", gguf_bytes.STRING, gguf_bytes.text("16")),
    "alpha true": field("adapter.lora.alpha", gguf_bytes.BOOL, b"\1"),
    "alpha endless": field("adapter.lora.alpha", gguf_bytes.F32, struct.pack("<f", math.inf)),
    "layout 2": field("fwdllm.layout_version", gguf_bytes.U32, struct.pack("<I", 2)),
    "layout 0": field("fwdllm.layout_version", gguf_bytes.U32, struct.pack("<I", 0)),
    "layout 1.0": field("fwdllm.layout_version", gguf_bytes.F32, struct.pack("<f", 1)),
    "layout true": field("fwdllm.layout_version", gguf_bytes.BOOL, b"\1"),
    # llama.cpp compares up to the NUL: it would end the process for the type of this alpha.
    "hidden alpha": field("adapter.lora.alpha\0", gguf_bytes.U8, b"\1"),
    "no key": field("", gguf_bytes.U8, b"\1"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_metadata_that_llama_cpp_reads_otherwise(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(small_gguf())
    check_gguf_adapter(path, "llama", shapes())
    path.write_bytes(small_gguf(WRONG[kind]))
    for read in (load, lambda path: check_gguf_adapter(path, "llama", shapes())):
        with pytest.raises(AdapterError):
            read(path)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.weight.lora_a\0_norm.weight",
        "blk.0.attn_q.lora_a.weight.lora_a",
        "blk.0.attn_q.weight.lora_a ",
        "blk.0.attn_norm.weight.lora_a",
    ],
)
def test_names_that_llama_cpp_reads_otherwise(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(small_gguf(name=name))
    with pytest.raises(AdapterError):
        check_gguf_adapter(path, "llama", shapes())


@pytest.mark.parametrize("kind", ["i32", "alpha-string", "overlap", "layout-99"])
def test_adapters_of_an_attack(hostile: Path, bundled: Path, kind: str) -> None:
    path = hostile / f"adapter-{kind}.gguf"
    with pytest.raises(AdapterError):
        Engine.load(bundled, adapter=path)
    with pytest.raises(AdapterError):
        logits(bundled, [1, 2], path, n_threads=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fwdllm.head.labels", ["a", "a"]),
        ("fwdllm.head.labels", ["a"] * 5),
        ("fwdllm.head.labels", [1, 2]),
        ("fwdllm.head.weight", [1.0] * 31),
        ("fwdllm.head.weight", [1.0] * 34),  # a width the model does not have
        ("fwdllm.head.weight", [1] * 32),
        ("fwdllm.head.weight", "x"),
        ("fwdllm.head.bias", [1.0]),
        ("fwdllm.head.bias", [float("inf"), 0.0]),
    ],
)
def test_gguf_head_that_is_damaged(tmp_path: Path, key: str, value: object) -> None:
    head = {
        "fwdllm.head.labels": ["a", "b"],
        "fwdllm.head.weight": [1.0] * 32,
        "fwdllm.head.bias": [1.0, 2.0],
    }

    def write(fields: dict[str, object]) -> Path:
        writer = GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        for name, field in fields.items():
            add = writer.add_string if isinstance(field, str) else writer.add_array
            add(name, field)
        for name, array in Q.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "a.gguf"

    assert load(write(head)).head == Head(("a", "b"), 16)
    with pytest.raises(AdapterError):
        load(write({**head, key: value}))
    if key != "fwdllm.head.labels":
        del head[key]
        with pytest.raises(AdapterError):
            load(write(head))


@pytest.mark.parametrize("name", ["no.gguf", "no.safetensors", "a\0b", "a\0b.safetensors"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError):
        load(tmp_path / name)


needs_model = pytest.mark.skipif(not TINYMIX.exists(), reason="the shared models are not here")


def tinymix_adapter(alpha: float, b_scale: float, rslora: bool) -> Adapter:
    block = {"attn_q": (256, 256), "attn_k": (128, 256), "ffn_down": (256, 704)}
    model = {f"blk.{i}.{name}": shape for i in range(6) for name, shape in block.items()}
    config = LoRAConfig(rank=4, alpha=alpha, targets=tuple(block), rslora=rslora)
    head = Head(("x", "y"), 256)
    adapter = Adapter.create("llama", model, config, 3, reference, head)
    rng = np.random.default_rng(1)
    for target in adapter.targets:
        lora = adapter.factors(target)
        lora.b[:] = b_scale * 0.1 * rng.standard_normal(lora.b.shape)
    return adapter


@needs_model
def test_llama_cpp_runs_the_adapter_at_our_scale(tmp_path: Path) -> None:
    ids = [0, 40, 611, 79, 221, 1108]

    def run(alpha: float, b_scale: float, rslora: bool = False) -> np.ndarray:
        save_gguf(tinymix_adapter(alpha, b_scale, rslora), tmp_path / "a.gguf")
        return logits(TINYMIX, ids, tmp_path / "a.gguf", n_threads=1)

    plain = logits(TINYMIX, ids, n_threads=1)
    np.testing.assert_array_equal(run(4, 0), plain)
    tuned = run(4, 1)
    assert np.abs(tuned - plain).max() > 0.5
    # alpha 8 with half of B is the same function: powers of two, so exactly.
    np.testing.assert_array_equal(run(8, 0.5), tuned)
    # alpha / sqrt(rank) is alpha / 2, twice alpha / rank.
    np.testing.assert_array_equal(run(4, 0.5, rslora=True), tuned)


@needs_model
def test_llama_cpp_refuses_what_does_not_fit(tmp_path: Path) -> None:
    small = save(random_adapter(), tmp_path / "small.gguf")
    with pytest.raises(AdapterError, match="as 16 x 16, but it is 256 x 256"):
        logits(TINYMIX, [1, 2], small, n_threads=1)
    with pytest.raises(AdapterError, match="not an adapter"):
        logits(TINYMIX, [1, 2], TINYMIX, n_threads=1)
    with pytest.raises(FwdllmError):
        logits(TINYMIX, [1, 2], tmp_path / "none.gguf", n_threads=1)
