"""PEFT folders: the names and the order of rows others expect, and folders that do not fit."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from small_adapters import N_HEADS, N_KV_HEADS, WIDTH, load, random_adapter, save, shapes

from fwdllm.engine.adapters import safetensors as safetensors_file
from fwdllm.engine.adapters.adapter import Head
from fwdllm.engine.adapters.io import load_adapter
from fwdllm.engine.adapters.peft import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE, row_order
from fwdllm.engine.errors import AdapterError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import reference

HEAD = Head(("negative", "positive"), WIDTH)


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
            "gemma3",
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
    for name, target in zip(names, adapter.targets, strict=True):
        lora = adapter.factors(target)
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


@pytest.mark.parametrize("architecture", ["llama", "granite", "smollm3"])
def test_only_q_and_k_of_llama_are_reordered(tmp_path: Path, architecture: str) -> None:
    config = LoRAConfig(rank=2, targets=("attn_q", "attn_k", "attn_v", "ffn_up"))
    adapter = random_adapter(config, architecture)
    save(adapter, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS_FILE)
    for name, module, heads in (
        ("attn_q", "self_attn.q_proj", N_HEADS),
        ("attn_k", "self_attn.k_proj", N_KV_HEADS),
        ("attn_v", "self_attn.v_proj", None),
        ("ffn_up", "mlp.up_proj", None),
    ):
        target = adapter.target(f"blk.2.{name}")
        assert target is not None
        lora = adapter.factors(target)
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
    architecture = "bert" if prefix == "bert." else "qwen2"
    adapter = load(tmp_path / "model.safetensors", architecture)
    assert adapter.config == LoRAConfig(4, 12.0, ("attn_v",), (0,))
    np.testing.assert_array_equal(adapter.theta, np.r_[a.ravel(), b.ravel()].astype(np.float32))


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
        (change_config(lora_alpha=6), "not saved with"),
        (change_config(use_rslora=True), "not saved with"),
        (remove(HEAD_FILE), "not saved with"),
        (overwrite(HEAD_FILE, b"x"), "not saved with"),
    ],
)
def test_peft_that_does_not_fit(tmp_path: Path, change: Callable[[Path], None], told: str) -> None:
    save(random_adapter(head=HEAD), tmp_path)
    change(tmp_path)
    with pytest.raises(AdapterError, match=told):
        load(tmp_path)


def test_what_does_not_change_the_adapter_may_be_changed(tmp_path: Path) -> None:
    adapter = random_adapter(head=HEAD)
    save(adapter, tmp_path)
    change_config(base_model_name_or_path="/another/place")(tmp_path)
    assert load(tmp_path).theta.tobytes() == adapter.theta.tobytes()


@pytest.mark.parametrize("heads", [(None, HEAD), (HEAD, None), (HEAD, HEAD), (None, None)])
def test_a_folder_that_is_overwritten_is_never_read_by_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: tuple[Head | None, Head | None]
) -> None:
    """Saving ends before its first rename, its second and so on, as a process that is killed."""
    old = random_adapter(LoRAConfig(2, 3.0), head=heads[0])
    new = random_adapter(LoRAConfig(2, 12.0), head=heads[1])
    new.theta[:] += 1
    replace, seen = os.replace, []
    for n_renames in range(4):
        folder = tmp_path / str(n_renames)
        save(old, folder)
        (folder / "README.md").write_text("the user's")
        left = iter(range(n_renames))

        def rename(source: Path, target: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", rename)
        with contextlib.suppress(KeyboardInterrupt):
            save(new, folder)
        monkeypatch.setattr(os, "replace", replace)
        assert (folder / "README.md").read_text() == "the user's"
        try:
            found = load(folder)
        except AdapterError:
            seen.append("refused")
        else:
            whole = [a for a in (old, new) if a.theta.tobytes() == found.theta.tobytes()]
            assert [(a.config, a.head) for a in whole] == [(found.config, found.head)]
            seen.append("old" if whole[0] is old else "new")
    assert (seen[0], seen[1], seen[-1]) == ("old", "refused", "new")


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
    adapter = random_adapter(architecture="gptneox")
    with pytest.raises(AdapterError, match="save as GGUF"):
        save(adapter, tmp_path)
    save(random_adapter(), tmp_path)
    with pytest.raises(AdapterError, match="'gptneox'"):
        load(tmp_path, "gptneox")
    with pytest.raises(AdapterError, match="heads"):
        load_adapter(tmp_path, "llama", shapes(), 5, 5, reference)
