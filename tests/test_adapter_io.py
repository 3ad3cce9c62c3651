"""Adapter files: exact round trips, the names others expect, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from gguf import GGUFReader, GGUFWriter
from small_adapters import N_HEADS, N_KV_HEADS, WIDTH, random_adapter, shapes

from fwdllm.engine import safetensors_file
from fwdllm.engine.adapter import Adapter, Head, LoRAConfig
from fwdllm.engine.adapter_io import load_adapter, save_gguf, save_peft
from fwdllm.engine.errors import AdapterError, ConfigError, FwdllmError, NumericsError
from fwdllm.engine.llamacpp import logits
from fwdllm.engine.peft import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE, row_order
from fwdllm.kernels import reference

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINYMIX = SHARED / "models" / "tinymix-6m.Q4_0.gguf"
HEAD = Head(("negative", "positiv\u00e4"), WIDTH)
CONFIGS = [
    LoRAConfig(rank=1, alpha=0.1),
    LoRAConfig(rank=3, alpha=16, targets=("ffn_down", "attn_k", "attn_q", "attn_output")),
    LoRAConfig(rank=2, alpha=4, targets=("ffn_up", "attn_v"), layers=(0, 2)),
]
QWEN = "qwen2"


def load(path: Path, architecture: str = "llama", n_layers: int = 3) -> Adapter:
    return load_adapter(path, architecture, shapes(n_layers), N_HEADS, N_KV_HEADS, reference)


def save(adapter: Adapter, path: Path) -> Path:
    if path.suffix == ".gguf":
        save_gguf(adapter, path)
    else:
        save_peft(adapter, path, N_HEADS, N_KV_HEADS, "someone/a-model")
    return path


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
    adapter.save(tmp_path / "a.gguf")
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


# Names and ranks of the state dict that peft 0.21 saves for these models.
@pytest.mark.parametrize(
    ("architecture", "names", "modules", "task"),
    [
        (
            "qwen2",
            ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"],
            ["down_proj", "q_proj"],
            "CAUSAL_LM",
        ),
        (
            "bert",
            ["encoder.layer.1.attention.self.query", "encoder.layer.1.output.dense"],
            ["encoder.layer.1.attention.self.query", "encoder.layer.1.output.dense"],
            "FEATURE_EXTRACTION",
        ),
    ],
)
def test_peft_as_another_reader_sees_it(
    tmp_path: Path, architecture: str, names: list[str], modules: list[str], task: str
) -> None:
    config = LoRAConfig(rank=2, alpha=3, targets=("attn_q", "ffn_down"), layers=(1,))
    adapter = random_adapter(config, architecture)
    save(adapter, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS_FILE)
    assert sorted(tensors) == sorted(
        f"base_model.model.{name}.lora_{half}.weight" for name in names for half in "AB"
    )
    for name, target in zip(names, ("blk.1.attn_q", "blk.1.ffn_down"), strict=True):
        lora = adapter.factors(target)
        assert lora is not None
        np.testing.assert_array_equal(tensors[f"base_model.model.{name}.lora_A.weight"], lora.a)
        np.testing.assert_array_equal(tensors[f"base_model.model.{name}.lora_B.weight"], lora.b)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    wanted = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "target_modules": modules,
        "layers_to_transform": [1],
        "task_type": task,
        "base_model_name_or_path": "someone/a-model",
    }
    assert wanted.items() <= written.items()


def rotate(x: np.ndarray, pairs: list[tuple[int, int]], angles: np.ndarray) -> np.ndarray:
    """Rotate the given pairs of the elements of each head: x [n_heads, head_dim]."""
    out = np.empty_like(x)
    for (i, j), angle in zip(pairs, angles, strict=True):
        out[:, i] = x[:, i] * np.cos(angle) - x[:, j] * np.sin(angle)
        out[:, j] = x[:, i] * np.sin(angle) + x[:, j] * np.cos(angle)
    return out


def test_row_order_turns_rotated_halves_into_rotated_neighbours() -> None:
    n_heads, head_dim = 3, 8
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, n_heads * head_dim))
    halves = [(i, i + head_dim // 2) for i in range(head_dim // 2)]
    neighbours = [(2 * i, 2 * i + 1) for i in range(head_dim // 2)]
    order = row_order("llama", "attn_q", len(q), n_heads, 1)
    at, distance = rng.uniform(0, 6, (2, head_dim // 2))

    def scores(q: np.ndarray, k: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
        q, k = q.reshape(n_heads, -1), k.reshape(n_heads, -1)
        return (rotate(q, pairs, at + distance) * rotate(k, pairs, at)).sum(axis=1)

    np.testing.assert_allclose(scores(q[order], k[order], neighbours), scores(q, k, halves))
    assert not np.allclose(scores(q, k, neighbours), scores(q, k, halves))


def test_only_q_and_k_of_llama_are_reordered(tmp_path: Path) -> None:
    config = LoRAConfig(rank=2, targets=("attn_q", "attn_k", "attn_v", "ffn_up"))
    adapter = random_adapter(config)
    save(adapter, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS_FILE)
    for name, module, heads in (
        ("attn_q", "self_attn.q_proj", N_HEADS),
        ("attn_k", "self_attn.k_proj", N_KV_HEADS),
        ("attn_v", "self_attn.v_proj", None),
        ("ffn_up", "mlp.up_proj", None),
    ):
        lora = adapter.factors(f"blk.2.{name}")
        assert lora is not None
        b = tensors[f"base_model.model.model.layers.2.{module}.lora_B.weight"]
        if heads:  # ``permute`` of llama.cpp's convert_hf_to_gguf.py
            b = b.reshape(heads, 2, -1, 2).swapaxes(1, 2).reshape(b.shape)
        np.testing.assert_array_equal(b, lora.b)


@pytest.mark.parametrize("prefix", ["", "model.", "bert."])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_peft_files_by_others(tmp_path: Path, prefix: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    stack = f"base_model.model.{prefix}" + ("encoder.layer.0" if prefix == "bert." else "layers.0")
    module = "attention.self.value" if prefix == "bert." else "self_attn.v_proj"
    a, b = rng.standard_normal((4, 16)).astype(dtype), rng.standard_normal((8, 4)).astype(dtype)
    tensors = {f"{stack}.{module}.lora_A.weight": a, f"{stack}.{module}.lora_B.weight": b}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    architecture = "bert" if prefix == "bert." else QWEN
    adapter = load(tmp_path / "model.safetensors", architecture)
    assert adapter.config == LoRAConfig(4, 12.0, ("attn_v",), (0,))
    np.testing.assert_array_equal(adapter.theta, np.r_[a.ravel(), b.ravel()].astype(np.float32))


def test_bfloat16_safetensors(tmp_path: Path) -> None:
    values = np.float32([1.5, -2.0, 0.25, 3.0])
    header = b'{"x":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}'
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + data)
    weight = safetensors_file.read(tmp_path / "x").tensors["x"].weight()
    np.testing.assert_array_equal(reference.dequantize(weight), values.reshape(2, 2))


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
        (pair("token_embd"), {}, "'token_embd'.*another model"),
        (pair("blk.0.attn_q", n_in=32), {}, "16 x 32, but it is 16 x 16"),
        (pair("blk.0.attn_q", n_out=8), {}, "8 x 16, but it is 16 x 16"),
        (Q | pair("blk.1.attn_q", rank=2), {}, r"mixes ranks \(2, 4\)"),
        (Q | pair("blk.1.attn_k", n_out=8), {}, "attn_[qk] in some layers"),
        ({k: v for k, v in Q.items() if k.endswith("a")}, {}, "lacks 'blk.0.attn_q.weight.lora_b"),
        (Q | {"blk.0.attn_q.weight.lora_b": np.ones((16, 3), np.float32)}, {}, "ranks 4 and 3"),
        (Q | {"blk.0.attn_q.weight.lora_b": np.ones(64, np.float32)}, {}, "dimensions"),
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


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | changes))

    return change


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
        assert any(old in name for name in tensors)
        tensors = {name.replace(old, new): array for name, array in tensors.items()}
        safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE)

    return change


def add(name: str, array: np.ndarray) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
        safetensors.numpy.save_file(tensors | {name: array}, folder / WEIGHTS_FILE)

    return change


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


ONES = np.ones((2, 16), np.float32)
LAYERS = "base_model.model.model.layers"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_config(r=3), "rank"),
        (change_config(r=[2]), "rank"),
        (change_config(lora_alpha="x"), "lora_alpha"),
        (change_config(lora_alpha=10**400), "lora_alpha"),
        (change_config(lora_alpha=float("nan")), "lora_alpha"),
        (change_config(lora_alpha=0), "lora_alpha"),
        (change_config(peft_type="LOHA"), "not the configuration"),
        (change_config(use_dora=True), "use_dora"),
        (change_config(rank_pattern={"q_proj": 3}), "rank_pattern"),
        (change_config(alpha_pattern={"q_proj": 3}), "alpha_pattern"),
        (change_config(fan_in_fan_out=True), "fan_in_fan_out"),
        (change_config(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
        (overwrite(CONFIG_FILE, b"{"), "cannot read"),
        (overwrite(CONFIG_FILE, b"\xff"), "cannot read"),
        (overwrite(CONFIG_FILE, b"[" * 100_000), "cannot read"),
        (overwrite(CONFIG_FILE, b"[]"), "not the configuration"),
        (overwrite(CONFIG_FILE, b" " * (1 << 20) + b"{}"), "not a PEFT configuration"),
        (remove(CONFIG_FILE), "does not exist"),
        (remove(WEIGHTS_FILE), "does not exist"),
        (rename("q_proj.lora_B", "q_proj.bias"), "'base_model.*q_proj.bias.weight', which is not"),
        (rename("q_proj", "x_proj"), "not a LoRA factor"),
        (rename("layers.1.", "layers.01."), "not a LoRA factor"),
        (rename("layers.2.", "layers.3."), "blk.3.attn_q"),
        (rename("layers.1.self_attn.q_proj.lora_A", "layers.7.self_attn.q_proj.lora_A"), "missing"),
        (add("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", ONES), "twice"),
        (add("base_model.model.classifier.weight", ONES), "classifier"),
        (add(f"{LAYERS}.0.mlp.up_proj.lora_A.weight", np.ones(2, np.float32)), "not a matrix"),
        (add(f"{LAYERS}.0.mlp.up_proj.lora_A.weight", ONES[:0]), "not a matrix"),
        (add("x", np.ones(2, np.int64)), "not of type"),
        (remove(HEAD_FILE), None),
        (overwrite(HEAD_FILE, b"x"), "too short"),
    ],
)
def test_peft_that_does_not_fit(
    tmp_path: Path, change: Callable[[Path], None], told: str | None
) -> None:
    adapter = random_adapter(head=HEAD)
    save(adapter, tmp_path)
    change(tmp_path)
    if told is None:
        assert load(tmp_path).theta.tobytes() == adapter.theta[: adapter.n_lora].tobytes()
        return
    with pytest.raises(AdapterError, match=told):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "labels"),
    [
        ({"weight": np.ones((2, 16))}, '["a", "b"]'),
        ({"weight": np.ones((2, 16)), "bias": np.ones(3)}, '["a", "b"]'),
        ({"weight": np.ones((2, 17)), "bias": np.ones(2)}, '["a", "b"]'),
        ({"weight": np.ones(()), "bias": np.ones(2)}, '["a", "b"]'),
        ({"weight": np.ones((2, 16)), "bias": np.ones(2)}, '["a", "a"]'),
        ({"weight": np.ones((2, 16)), "bias": np.ones(2)}, '[["a"], ["b"]]'),
        ({"weight": np.ones((2, 16)), "bias": np.ones(2)}, "{"),
        ({"weight": np.ones((2, 16)), "bias": np.ones(2)}, "3"),
    ],
)
def test_peft_head_that_is_damaged(tmp_path: Path, arrays: dict, labels: str) -> None:
    save(random_adapter(), tmp_path)
    safetensors_file.write(tmp_path / HEAD_FILE, arrays, {"labels": labels})
    with pytest.raises(AdapterError):
        load(tmp_path)


def test_architectures_and_head_counts_without_peft_names(tmp_path: Path) -> None:
    adapter = random_adapter(architecture="phi3")
    with pytest.raises(AdapterError, match="save as GGUF"):
        save(adapter, tmp_path)
    save(random_adapter(), tmp_path)
    with pytest.raises(AdapterError, match="'phi3'"):
        load(tmp_path, "phi3")
    with pytest.raises(AdapterError, match="heads"):
        load_adapter(tmp_path, "llama", shapes(), 5, 5, reference)


@pytest.mark.parametrize("name", ["no.gguf", "no.safetensors", "a\0b", "a\0b.safetensors"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError):
        load(tmp_path / name)


def safetensors_bytes(header: str, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header.encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "short"),
        (b"\1" * 7, "short"),
        (safetensors_bytes("{}", length=3), "claims"),
        (safetensors_bytes("{}", length=2**64 - 1), "claims"),
        (safetensors_bytes("[]"), "not a JSON object"),
        (safetensors_bytes("{"), "not valid JSON"),
        (safetensors_bytes('{"a":' * 100_000), "not valid JSON"),
        (safetensors_bytes('{"x":' + "9" * 5000 + "}"), "not valid JSON"),
        (safetensors_bytes(f'{{"x":{entry()},"x":{entry()}}}', bytes(4)), "twice"),
        (safetensors_bytes(f'{{"x":{entry(shape=[float("nan")])}}}', bytes(4)), "NaN"),
        (safetensors_bytes('{"x":[]}'), "malformed"),
        (safetensors_bytes('{"__metadata__":{"a":1}}'), "map of strings"),
        (safetensors_bytes('{"__metadata__":"a"}'), "map of strings"),
        (safetensors_bytes(f'{{"x":{entry("I64", [1], [0, 8])}}}', bytes(8)), "not of type"),
        (safetensors_bytes(f'{{"x":{entry(["F32"])}}}', bytes(4)), "not of type"),
        (safetensors_bytes(f'{{"x":{entry(shape=[-1])}}}', bytes(4)), "malformed"),
        (safetensors_bytes(f'{{"x":{entry(shape=[True])}}}', bytes(4)), "malformed"),
        (safetensors_bytes(f'{{"x":{entry(shape=[1] * 5)}}}', bytes(4)), "malformed"),
        (safetensors_bytes(f'{{"x":{entry(offsets=[0, 4, 8])}}}', bytes(4)), "malformed"),
        (safetensors_bytes(f'{{"x":{entry(offsets=[0, 8])}}}', bytes(8)), "does not match"),
        (safetensors_bytes(f'{{"x":{entry(offsets=[8, 4])}}}', bytes(8)), "does not match"),
        (safetensors_bytes(f'{{"x":{entry(offsets=[4, 8])}}}', bytes(8)), "overlap or leave"),
        (safetensors_bytes(f'{{"x":{entry()},"y":{entry()}}}', bytes(4)), "overlap or leave"),
        (safetensors_bytes(f'{{"x":{entry()}}}', bytes(3)), "4 bytes, but 3"),
        (safetensors_bytes(f'{{"x":{entry()}}}', bytes(5)), "4 bytes, but 5"),
        (safetensors_bytes('{"' + "x" * 9999 + '":1}'), "x{70,80}[.]{3}' is malformed"),
    ],
)
def test_unsound_safetensors(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(AdapterError, match=told) as raised:
        safetensors_file.read(tmp_path / "x")
    assert len(str(raised.value)) < 1000


def test_safetensors_agree_with_the_reference_implementation(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((), np.float32)}
    safetensors_file.write(tmp_path / "ours", arrays, {"key": "v\u00e4lue"})
    found = safetensors.numpy.load_file(tmp_path / "ours")
    assert sorted(found) == ["a", "b"]
    np.testing.assert_array_equal(found["b"], arrays["b"])
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", {"key": "v\u00e4lue"})
    file = safetensors_file.read(tmp_path / "theirs")
    assert file.metadata == {"key": "v\u00e4lue"}
    np.testing.assert_array_equal(reference.dequantize(file.tensors["b"].weight()), arrays["b"])


needs_model = pytest.mark.skipif(not TINYMIX.exists(), reason="the shared models are not here")


def tinymix_adapter(alpha: float, b_scale: float) -> Adapter:
    block = {"attn_q": (256, 256), "attn_k": (128, 256), "ffn_down": (256, 704)}
    model = {f"blk.{i}.{name}": shape for i in range(6) for name, shape in block.items()}
    config = LoRAConfig(rank=4, alpha=alpha, targets=tuple(block))
    head = Head(("x", "y"), 256)
    adapter = Adapter.create("llama", model, config, 3, reference, head)
    rng = np.random.default_rng(1)
    for target in adapter.targets:
        lora = adapter.factors(target.name)
        assert lora is not None
        lora.b[:] = b_scale * 0.1 * rng.standard_normal(lora.b.shape)
    return adapter


@needs_model
def test_llama_cpp_runs_the_adapter_at_our_scale(tmp_path: Path) -> None:
    ids = [0, 40, 611, 79, 221, 1108]

    def run(alpha: float, b_scale: float) -> np.ndarray:
        save_gguf(tinymix_adapter(alpha, b_scale), tmp_path / "a.gguf")
        return logits(TINYMIX, ids, tmp_path / "a.gguf", n_threads=1)

    plain = logits(TINYMIX, ids, n_threads=1)
    np.testing.assert_array_equal(run(4, 0), plain)
    tuned = run(4, 1)
    assert np.abs(tuned - plain).max() > 0.5
    # alpha 8 with half of B is the same function: powers of two, so exactly.
    np.testing.assert_array_equal(run(8, 0.5), tuned)


@needs_model
def test_llama_cpp_refuses_what_does_not_fit(tmp_path: Path) -> None:
    small = save(random_adapter(), tmp_path / "small.gguf")
    with pytest.raises(AdapterError, match="incorrect shape"):
        logits(TINYMIX, [1, 2], small, n_threads=1)
    with pytest.raises(AdapterError, match="not an adapter"):
        logits(TINYMIX, [1, 2], TINYMIX, n_threads=1)
    with pytest.raises(FwdllmError):
        logits(TINYMIX, [1, 2], tmp_path / "none.gguf", n_threads=1)
