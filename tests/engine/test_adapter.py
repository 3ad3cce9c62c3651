"""Adapters: what may be configured, where each parameter lives, and how theta changes."""

from __future__ import annotations

import numpy as np
import pytest
from small_adapters import WIDTH, random_adapter, shapes

from fwdllm.engine.adapters.adapter import Adapter, Head, layout
from fwdllm.engine.directions import Dense
from fwdllm.engine.errors import ConfigError, NumericsError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import reference

SEED = 0x1234_5678_9ABC_DEF0


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 2.0},
        {"rank": True},
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"alpha": 1e39},
        {"alpha": "16x"},
        {"targets": ()},
        {"targets": "attn_q"},
        {"targets": ("attn_q", "attn_q")},
        {"targets": (1,)},
        {"layers": ()},
        {"layers": (1, 1)},
        {"layers": (-1,)},
        {"layers": 3},
        {"rslora": 1},
    ],
)
def test_config_refuses(options: dict) -> None:
    with pytest.raises(ConfigError):
        LoRAConfig(**options)


def test_config_is_canonical() -> None:
    config = LoRAConfig(targets=("attn_v", "attn_q"), layers=(2, 0), alpha=0.1)
    assert config == LoRAConfig(targets=["attn_q", "attn_v"], layers=[0, 2], alpha=np.float32(0.1))
    assert config.alpha == float(np.float32(0.1))
    assert LoRAConfig(rank=4, alpha=2).scale == 0.5


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    config = LoRAConfig(rank=16, alpha=2, rslora=True)
    assert (config.scale, config.file_alpha) == (0.5, 8)
    assert LoRAConfig(**config.recorded()) == config
    assert "rslora" not in LoRAConfig().recorded()


@pytest.mark.parametrize(
    ("labels", "n_in"),
    [((), 4), (("a", "a"), 4), (("",), 4), (("\ud800",), 4), ((1,), 4), ("a", 0)],
)
def test_head_refuses(labels: tuple, n_in: int) -> None:
    with pytest.raises(ConfigError):
        Head(labels, n_in)


def test_layout_by_hand() -> None:
    config = LoRAConfig(rank=2, targets=("ffn_down", "attn_k"), layers=(0, 2))
    found = [(t.name, t.layer, t.n_in, t.n_out, t.offset) for t in layout(shapes(), config)]
    assert found == [
        ("blk.0.attn_k", 0, 16, 8, 0),
        ("blk.0.ffn_down", 0, 24, 16, 48),  # 2 * (16 + 8)
        ("blk.2.attn_k", 2, 16, 8, 128),  # + 2 * (24 + 16)
        ("blk.2.ffn_down", 2, 24, 16, 176),
    ]


def test_layers_ascend_as_numbers_and_input_order_is_irrelevant() -> None:
    scrambled = dict(sorted(shapes(12).items(), reverse=True))
    layers = [target.layer for target in layout(scrambled, LoRAConfig(targets=("attn_q",)))]
    assert layers == list(range(12))


def test_other_tensors_and_blocks_without_the_target_are_left_out() -> None:
    mixed = {"output": (9, 16), "blk.0.attn_q": (16, 16), "blk.1.ffn_up": (24, 16)}
    found = layout(mixed, LoRAConfig(targets=("attn_q", "ffn_up")))
    assert [target.name for target in found] == ["blk.0.attn_q", "blk.1.ffn_up"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"targets": ("attn_q", "q_proj")}, "'q_proj'.*attn_k, attn_output, attn_q"),
        ({"targets": ("output",)}, "'output'"),
        ({"layers": (1, 3)}, "no layer 3.*0 to 2"),
    ],
)
def test_layout_names_what_exists(options: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        layout(shapes() | {"output": (9, 16)}, LoRAConfig(**options))


def test_layout_refuses_a_named_layer_without_targets() -> None:
    mixed = {"blk.0.attn_q": (16, 16), "blk.1.ffn_up": (24, 16)}
    with pytest.raises(ConfigError, match="Layer 1 has none"):
        layout(mixed, LoRAConfig(targets=("attn_q",), layers=(0, 1)))


def test_create_draws_each_a_from_the_stream_at_its_own_index() -> None:
    config = LoRAConfig(rank=2, targets=("attn_k", "ffn_down"), layers=(1,))
    adapter = Adapter.create("llama", shapes(), config, SEED, reference, Head(("x", "y"), WIDTH))
    stream = reference.normal(SEED, 0, 200)
    expected = np.zeros(adapter.n_lora + adapter.n_head, np.float32)
    expected[0:32] = stream[0:32] * np.float32(1 / 4)  # sqrt(16)
    expected[48:96] = stream[48:96] * np.float32(1 / np.sqrt(24))
    np.testing.assert_array_equal(adapter.theta, expected)
    assert adapter.n_lora == 128
    assert adapter.n_head == 2 * WIDTH + 2
    assert adapter.targets[0].layer == 1


def test_a_rank_that_no_target_has_is_refused() -> None:
    # attn_k is 8 x 16 and ffn_up 24 x 16.
    config = LoRAConfig(rank=16, targets=("attn_k", "ffn_up"))
    assert Adapter.create("llama", shapes(), config, 1, reference).config.rank == 16
    for config in (
        LoRAConfig(17, targets=("attn_k", "ffn_up")),
        LoRAConfig(9, targets=("attn_k",)),
    ):
        with pytest.raises(ConfigError, match=f"rank {config.rank} is more than"):
            Adapter.create("llama", shapes(), config, 1, reference)


def test_factors_are_views_in_the_layout() -> None:
    adapter = random_adapter()
    adapter.theta[:] = np.arange(len(adapter.theta))
    target = adapter.targets[1]
    lora = adapter.factors(target)
    assert (lora.a.shape, lora.b.shape, lora.offset) == ((2, 16), (8, 2), target.offset)
    assert lora.scale == 1.5
    assert lora.a.ravel().tolist() == list(range(target.offset, target.offset + 32))
    assert lora.b.ravel().tolist() == list(range(target.offset + 32, target.offset + 48))
    adapter.theta[target.offset] = -7
    assert lora.a[0, 0] == -7
    assert adapter.target(target.name) is target
    assert adapter.target("blk.0.ffn_up") is None


def test_head_is_the_end_of_theta() -> None:
    adapter = random_adapter(head=Head(("x", "y", "z"), WIDTH))
    weight, bias = adapter.head_weight, adapter.head_bias
    assert weight is not None
    assert bias is not None
    assert (weight.shape, bias.shape) == ((3, WIDTH), (3,))
    np.testing.assert_array_equal(np.r_[weight.ravel(), bias], adapter.theta[adapter.n_lora :])
    bias[:] = 4
    assert adapter.theta[-3:].tolist() == [4, 4, 4]
    assert random_adapter().head_weight is None
    assert random_adapter().head_bias is None


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_add_moves_the_factors_and_not_the_head(distribution: str) -> None:
    adapter = random_adapter(head=Head(("x", "y"), WIDTH))
    before, n = adapter.theta.copy(), adapter.n_lora
    stream = getattr(reference, distribution)
    adapter.add([SEED, 2**64 - 1], [0.5, -2.0], Dense(adapter, distribution))
    wanted = before[:n] + 0.5 * stream(SEED, 0, n) - 2.0 * stream(2**64 - 1, 0, n)
    np.testing.assert_allclose(adapter.theta[:n], wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(adapter.theta[n:], before[n:])


def test_add_refuses_and_leaves_theta_alone() -> None:
    adapter = random_adapter()
    before = adapter.theta.copy()
    with pytest.raises(NumericsError):
        adapter.add([1, 2], [1.0, np.inf])
    with pytest.raises(ConfigError):
        adapter.add([1, 2], [1.0])
    with pytest.raises(ConfigError):
        adapter.add([1], [1.0], Dense(adapter, "cauchy"))
    np.testing.assert_array_equal(adapter.theta, before)


@pytest.mark.parametrize(
    "theta",
    [np.zeros(3, np.float32), np.zeros(336, np.float64), np.zeros(672, np.float32)[::2]],
    ids=["size", "dtype", "stride"],
)
def test_theta_must_fit(theta: np.ndarray) -> None:
    adapter = random_adapter()
    with pytest.raises(ValueError, match="theta"):
        Adapter("llama", adapter.config, adapter.targets, theta, reference)
