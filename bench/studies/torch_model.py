"""The engine's graphs in PyTorch on decoded weights, to have autograd's gradient of theta.

Written from the papers and independent of engine/: no kernel, Pass or graph of ours is used,
only the file's tensors, the flat layout of theta and the batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from fwdllm.engine import Engine
from fwdllm.engine.data.batch import Batch


class TorchModel:
    """Losses of an engine's model as a differentiable function of theta."""

    def __init__(self, engine: Engine, dtype: torch.dtype = torch.float64) -> None:
        self.engine, self.args, self.dtype = engine, engine.args, dtype
        file, ops = engine.file, engine.ops
        self.tensors = {}
        for name, info in file.tensors.items():
            value = file.vector(name) if len(info.shape) == 1 else ops.dequantize(file.weight(name))
            self.tensors[name] = torch.tensor(value, dtype=dtype)

    def theta(self) -> torch.Tensor:
        """The adapter's parameters as a leaf that collects a gradient."""
        assert self.engine.adapter is not None
        return torch.tensor(self.engine.adapter.theta, dtype=self.dtype, requires_grad=True)

    def loss(self, theta: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean negative log-likelihood per label of the batch."""
        x = self.hidden(theta, batch)
        if batch.classes is not None:
            scores = self.head_scores(theta, by_sequence(x, batch))
            return F.cross_entropy(scores, torch.tensor(batch.classes, dtype=torch.long))
        x = self._rms_norm(x[torch.tensor(batch.label_rows, dtype=torch.long)], "output_norm")
        output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return F.cross_entropy(x @ output.T, torch.tensor(batch.label_ids, dtype=torch.long))

    def head_scores(self, theta: torch.Tensor, hidden: list[torch.Tensor]) -> torch.Tensor:
        """Class scores of sequences from their pooled features."""
        adapter = self.engine.adapter
        assert adapter is not None
        assert adapter.head is not None
        n_labels, width = len(adapter.head.labels), adapter.head.n_in
        weight = theta[adapter.n_lora :][: n_labels * width].reshape(n_labels, width)
        features = torch.stack([h.mean(0) if self.args.pooling == "mean" else h[0] for h in hidden])
        return features @ weight.T + theta[adapter.n_lora + n_labels * width :]

    def hidden(self, theta: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The last layer's output for the batch's rows."""
        x = self.tensors["token_embd.weight"][torch.tensor(batch.ids, dtype=torch.long)]
        if self.engine.architecture == "bert":
            return self._bert(theta, batch, x)
        for i in range(self.args.n_layers):
            block = f"blk.{i}"
            h = self._rms_norm(x, f"{block}.attn_norm")
            x = x + self._self_attention(theta, batch, block, h)
            h = self._rms_norm(x, f"{block}.ffn_norm")
            gate = self._linear(theta, h, f"{block}.ffn_gate")
            up = self._linear(theta, h, f"{block}.ffn_up")
            x = x + self._linear(theta, F.silu(gate) * up, f"{block}.ffn_down")
        return x

    def _bert(self, theta: torch.Tensor, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        positions = torch.tensor(batch.positions, dtype=torch.long)
        x = (
            x
            + self.tensors["token_types.weight"][0]
            + self.tensors["position_embd.weight"][positions]
        )
        x = self._layer_norm(x, "token_embd_norm")
        for i in range(self.args.n_layers):
            block = f"blk.{i}"
            x = x + self._self_attention(theta, batch, block, x)
            x = self._layer_norm(x, f"{block}.attn_output_norm")
            h = F.gelu(self._linear(theta, x, f"{block}.ffn_up"), approximate="tanh")
            x = self._layer_norm(
                x + self._linear(theta, h, f"{block}.ffn_down"), f"{block}.layer_output_norm"
            )
        return x

    def _self_attention(
        self, theta: torch.Tensor, batch: Batch, block: str, x: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (self._linear(theta, x, f"{block}.attn_{n}") for n in "qkv")
        parts = zip(*(by_sequence(t, batch) for t in (q, k, v)), strict=True)
        mixed = torch.cat([self._attend(block, *part) for part in parts])
        return self._linear(theta, mixed, f"{block}.attn_output")

    def _attend(
        self, block: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attention inside one sequence."""
        causal, n = self.engine.architecture != "bert", len(q)
        q, k, v = (t.reshape(n, -1, self.args.head_dim) for t in (q, k, v))
        if causal:
            if self.args.qk_norm:
                q = self._rms_norm(q, f"{block}.attn_q_norm")
                k = self._rms_norm(k, f"{block}.attn_k_norm")
            q, k = self._rope(q), self._rope(k)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(self.args.head_dim)
        if causal:
            mask = torch.ones(n, n, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(mask, -math.inf)
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(n, -1)

    def _rope(self, x: torch.Tensor) -> torch.Tensor:
        half = self.args.rotary.dim // 2
        frequency = self.args.rotary.base ** (-torch.arange(half, dtype=self.dtype) / half)
        angle = torch.arange(len(x), dtype=self.dtype)[:, None] * frequency
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        if self.args.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def _linear(self, theta: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ self.tensors[f"{name}.weight"].T
        if f"{name}.bias" in self.tensors:
            y = y + self.tensors[f"{name}.bias"]
        adapter = self.engine.adapter
        assert adapter is not None
        for target in adapter.targets:
            if target.name == name:
                rank = adapter.config.rank
                a_size = rank * target.n_in
                a = theta[target.offset :][:a_size].reshape(rank, target.n_in)
                b = theta[target.offset + a_size :][: rank * target.n_out].reshape(-1, rank)
                y = y + adapter.config.scale * (x @ a.T) @ b.T
        return y

    def _rms_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.args.norm_eps)
        return x * scale * self.tensors[f"{name}.weight"]

    def _layer_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.args.norm_eps)


def by_sequence(x: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """The rows of each sequence."""
    return list(x.split(np.diff(batch.starts).tolist()))


def gradient(model: TorchModel, batch: Batch) -> np.ndarray:
    """Autograd's gradient of the batch's loss by theta: float64 [n]."""
    theta = model.theta()
    model.loss(theta, batch).backward()
    assert theta.grad is not None
    return theta.grad.numpy()
