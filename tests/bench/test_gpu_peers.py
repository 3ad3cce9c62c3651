"""The peers of the GPU's step on a tiny model and a CPU: against plain PyTorch and autograd."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("transformers", "peft"):  # found, not imported: that takes ten seconds
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

from torch.nn import functional as F  # noqa: E402

from fwdllm.bench import gpu_peers  # noqa: E402
from fwdllm.bench.gpu_peers import PeerModel  # noqa: E402

# bitsandbytes on a CPU wants rows of whole blocks of 64.
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 2, 64, 4, 2, 16, 128, 89
RANK, ALPHA, EPS, BASE = 4, 6.0, 1e-5, 500.0
N_OUT = {"attn_q": HEADS * HEAD_DIM, "attn_v": KV_HEADS * HEAD_DIM}
LAYER_SHAPES = {
    "attn_norm": (WIDTH,),
    "attn_q": (HEADS * HEAD_DIM, WIDTH),
    "attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
    "attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
    "attn_output": (WIDTH, HEADS * HEAD_DIM),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (HIDDEN, WIDTH),
    "ffn_up": (HIDDEN, WIDTH),
    "ffn_down": (WIDTH, HIDDEN),
}
OUTER_SHAPES = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,), "output": (VOCAB, WIDTH)}
IDS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(7))
SIDES = {
    "backprop bf16",
    "backprop bf16, checkpointing",
    "mezo bf16",
    "mezo bf16, compiled",
    "backprop nf4",
    "mezo nf4",
}
NF4 = {"backprop nf4", "mezo nf4"}

# transformers 5.23 changes names that PEFT uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def tiny(dtype: torch.dtype) -> PeerModel:
    """A random model; the adapter is no smaller than the weights, so that it shows."""
    random = torch.Generator().manual_seed(3)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        values = 0.2 * torch.randn(shape, generator=random)
        return values + 1 if len(shape) == 1 else values

    shapes = dict(OUTER_SHAPES)
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in LAYER_SHAPES.items()}
    weights = {f"{name}.weight": draw(shape).to(dtype) for name, shape in shapes.items()}
    factors = {
        f"blk.{layer}.{target}": (draw((RANK, WIDTH)), draw((n_out, RANK)))
        for layer in range(LAYERS)
        for target, n_out in N_OUT.items()
    }
    return PeerModel(
        n_layers=LAYERS,
        width=WIDTH,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        hidden=HIDDEN,
        n_vocab=VOCAB,
        context=32,
        norm_eps=EPS,
        rope_base=BASE,
        weight=weights.__getitem__,
        factors=factors.__getitem__,
        rank=RANK,
        alpha=ALPHA,
        targets=tuple(N_OUT),
    )


def reference_loss(model: PeerModel, ids: torch.Tensor, scale: float = ALPHA / RANK) -> float:
    """The loss by hand in float64, with ``scale`` times B A added to the targets."""
    x = weight(model, "token_embd")[ids]
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        x = x + attention(model, block, norm(x, weight(model, f"{block}.attn_norm")), scale)
        h = norm(x, weight(model, f"{block}.ffn_norm"))
        gate = h @ weight(model, f"{block}.ffn_gate").T
        up = h @ weight(model, f"{block}.ffn_up").T
        x = x + (gate * torch.sigmoid(gate) * up) @ weight(model, f"{block}.ffn_down").T
    logits = norm(x, weight(model, "output_norm")) @ weight(model, "output").T
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1)).item()


def attention(model: PeerModel, block: str, h: torch.Tensor, scale: float) -> torch.Tensor:
    def heads(name: str, count: int) -> torch.Tensor:
        matrix = weight(model, f"{block}.{name}")
        if name in N_OUT:
            a, b = model.factors(f"{block}.{name}")
            matrix = matrix + scale * b.double() @ a.double()
        split = (h @ matrix.T).unflatten(-1, (count, HEAD_DIM)).transpose(1, 2)
        return split.repeat_interleave(HEADS // count, dim=1)  # query heads share keys in runs

    q, k, v = heads("attn_q", HEADS), heads("attn_k", KV_HEADS), heads("attn_v", KV_HEADS)
    scores = rotate(q) @ rotate(k).mT / math.sqrt(HEAD_DIM)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2) @ weight(model, f"{block}.attn_output").T


def rotate(x: torch.Tensor) -> torch.Tensor:
    """RoPE over halves: dimension i turns with i + head_dim / 2."""
    half = HEAD_DIM // 2
    speeds = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * speeds
    a, b = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain


def weight(model: PeerModel, name: str) -> torch.Tensor:
    return model.weight(f"{name}.weight").double()


def directions(parameters: list[Any], seed: int) -> list[torch.Tensor]:
    """The seed's direction, read off zeros that are perturbed with it."""
    zeros = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    gpu_peers.perturb(zeros, seed, 1.0)
    return [z.detach() for z in zeros]


def values(parameters: list[Any]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@pytest.fixture
def model() -> PeerModel:
    """In float32, where differences of losses are not all noise."""
    return tiny(torch.float32)


@pytest.fixture
def peer(model: PeerModel) -> Any:
    built = gpu_peers.build(model, nf4=False)
    gpu_peers.set_factors(built, model)
    return built


@pytest.fixture(scope="module")
def quick_compiler() -> Iterator[None]:
    """Layers are traced as for a GPU, but run as traced: compiling takes too long for a test."""
    compile_layer = torch.nn.Module.compile

    def trace_layer(self: Any, **options: Any) -> None:
        compile_layer(self, backend="eager", **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", trace_layer)
        yield


@pytest.fixture(scope="module")
def report(quick_compiler: None) -> dict[str, Any]:
    return gpu_peers.measure_peers(tiny(torch.bfloat16), IDS, 3, 2, "cpu")


def run_sides(report: dict[str, Any]) -> dict[str, Any]:
    return {name: side for name, side in report.items() if name in SIDES - NF4}


def test_every_side_has_its_figures(report: dict[str, Any]) -> None:
    assert set(report) == SIDES | {"versions"}
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["torch"] == torch.__version__
    for name, side in run_sides(report).items():
        low, high = side["seconds_range"]
        assert 0 < low <= side["seconds"] <= high, name
        assert side["peak_bytes"] is None
        assert ("slopes" in side) == name.startswith("mezo")


def test_all_sides_start_at_the_loss_of_the_reference(report: dict[str, Any]) -> None:
    model = tiny(torch.bfloat16)
    expected = reference_loss(model, IDS)
    assert abs(reference_loss(model, IDS, scale=0.0) - expected) > 0.1  # the adapter matters
    losses = {side["loss"] for side in run_sides(report).values()}
    assert len(losses) == 1
    assert losses.pop() == pytest.approx(expected, abs=0.02)


def test_loss_in_float32_is_the_reference_loss(model: PeerModel, peer: Any) -> None:
    loss = gpu_peers.batch_loss(peer, IDS)
    assert loss.item() == pytest.approx(reference_loss(model, IDS), rel=1e-6)


def test_the_adapter_is_float32_on_bfloat16_weights() -> None:
    peer = gpu_peers.build(tiny(torch.bfloat16), nf4=False)
    parameters = gpu_peers.trainable(peer)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert len(parameters) == 2 * LAYERS * len(N_OUT)
    assert peer.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_slopes_are_autograd_derivatives_along_the_same_directions(peer: Any) -> None:
    parameters, seeds = gpu_peers.trainable(peer), range(4)
    gradient = torch.autograd.grad(gpu_peers.batch_loss(peer, IDS), parameters)
    before, frozen = values(parameters), values(list(peer.parameters()))
    slopes = gpu_peers.central_slopes(peer, parameters, IDS, seeds)
    for seed, slope in zip(seeds, slopes, strict=True):
        z = directions(parameters, seed)
        expected = sum((g * d).sum().item() for g, d in zip(gradient, z, strict=True))
        assert abs(expected) > 0.02
        assert slope == pytest.approx(expected, rel=0.01, abs=2e-3)
    torch.testing.assert_close(values(parameters), before, rtol=0, atol=1e-6)
    for parameter, old in zip(peer.parameters(), frozen, strict=True):
        assert parameter.requires_grad or torch.equal(parameter, old)


def test_a_step_of_mezo_moves_along_its_slopes(peer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_peers, "RATE", 0.5)  # an update that is seen in float32
    parameters = gpu_peers.trainable(peer)
    before = values(parameters)
    facts = gpu_peers._mezo(peer, IDS, 3)()
    for seed, slope in enumerate(facts["slopes"]):
        for old, z in zip(before, directions(parameters, seed), strict=True):
            old -= 0.5 / 3 * slope * z
    torch.testing.assert_close(values(parameters), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_backprop_follows_the_gradient(
    peer: Any, monkeypatch: Any, checkpointing: bool
) -> None:
    monkeypatch.setattr(gpu_peers, "RATE", 0.5)
    parameters = gpu_peers.trainable(peer)
    loss = gpu_peers.batch_loss(peer, IDS)
    gradient = torch.autograd.grad(loss, parameters)
    expected = [old - 0.5 * g for old, g in zip(values(parameters), gradient, strict=True)]
    passes = []
    attention = peer.get_base_model().model.layers[0].self_attn
    attention.register_forward_hook(lambda *_: passes.append(1))
    facts = gpu_peers._backprop(peer, IDS, 3, checkpointing)()
    assert facts == {"loss": pytest.approx(loss.item())}
    assert len(passes) == (2 if checkpointing else 1)  # checkpointing computes layers again
    torch.testing.assert_close(values(parameters), expected, rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in parameters)


def test_factors_are_set_back_after_a_side(model: PeerModel, peer: Any) -> None:
    before = values(gpu_peers.trainable(peer))
    gpu_peers.perturb(gpu_peers.trainable(peer), 0, 1.0)
    gpu_peers.set_factors(peer, model)
    torch.testing.assert_close(values(gpu_peers.trainable(peer)), before, rtol=0, atol=0)


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_without_a_package_every_side_says_so(
    model: PeerModel, monkeypatch: Any, package: str
) -> None:
    for missing in (package, "bitsandbytes"):
        monkeypatch.setitem(sys.modules, missing, None)
    report = gpu_peers.measure_peers(model, IDS, 1, 1, "cpu")
    assert set(report) == SIDES | {"versions"}
    assert all(report[name] == {"skipped": f"{package} is not installed"} for name in SIDES)


def test_sides_that_fail_leave_the_others(model: PeerModel, monkeypatch: Any) -> None:
    def fail(*_: Any, **options: Any) -> None:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    report = gpu_peers.measure_peers(model, IDS, 1, 1, "cpu")
    assert all(report[name] == {"skipped": "bitsandbytes is not installed"} for name in NF4)
    assert report["mezo bf16, compiled"] == {"skipped": "RuntimeError: no compiler"}
    assert report["mezo bf16"]["slopes"]


def test_a_model_larger_than_the_gpu(model: PeerModel) -> None:
    def exhaust(name: str) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    large = PeerModel(**{**vars(model), "weight": exhaust})
    report = gpu_peers.measure_peers(large, IDS, 1, 1, "cpu")
    reason = {"skipped": "it does not fit the memory of the GPU"}
    assert all(report[name] == reason for name in SIDES - NF4)


def test_nf4_is_near_the_unquantized_model(quick_compiler: None) -> None:
    pytest.importorskip("bitsandbytes")
    report = gpu_peers.measure_peers(tiny(torch.bfloat16), IDS, 1, 1, "cpu")
    for side in ("backprop", "mezo"):
        quantized, plain = report[f"{side} nf4"]["loss"], report[f"{side} bf16"]["loss"]
        assert quantized != plain
        assert quantized == pytest.approx(plain, abs=0.2)


def test_nothing_but_torch_is_needed_to_import_it() -> None:
    source = ast.parse(Path(gpu_peers.__file__).read_text())
    assert imported(source.body) - set(sys.stdlib_module_names) == {"torch"}
    others = imported(ast.walk(source)) - set(sys.stdlib_module_names)
    assert others == {"torch", "transformers", "peft"}


def imported(nodes: Any) -> set[str]:
    """The top-level packages that import statements among the nodes name."""
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return {name.partition(".")[0] for name in names}
