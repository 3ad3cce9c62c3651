"""A llama in plain PyTorch, its parameters named as in a GGUF file.

RoPE turns interleaved pairs (2i, 2i + 1), the GGUF convention of the llama family, so weights
are exported without permutation. PyTorch is needed for training only: ``pip install torch``.
"""

from __future__ import annotations

from dataclasses import dataclass

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError as error:  # pragma: no cover
    raise ImportError("training the bundled model needs PyTorch: pip install torch") from error

Q4_BLOCK = 32


@dataclass(frozen=True)
class Config:
    """Shape of the model. ``ff`` and ``width`` are multiples of 32, the Q4_0 block."""

    vocab: int = 2048
    width: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    ff: int = 704
    context: int = 512
    rope_base: float = 10000.0
    eps: float = 1e-5


def fake_q4_0(weight: Tensor) -> Tensor:
    """The weight as Q4_0 would store it; gradients pass straight through.

    As ggml: per block of 32 the scale is the signed extreme over -8, kept in float16.
    """
    blocks = weight.detach().reshape(-1, Q4_BLOCK)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = extreme / -8
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    codes = (blocks * inverse + 8.5).floor_().clamp_(0, 15).sub_(8)
    rounded = (codes * scale.half().float()).reshape(weight.shape)
    return weight + (rounded - weight.detach())


class Llama(nn.Module):
    """Decoder with grouped-query attention, SwiGLU and the output tied to the embedding."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.quantize = False
        generator = torch.Generator().manual_seed(seed)
        c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.weights = nn.ParameterDict()
        residual = (2 * c.layers) ** -0.5

        def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
            values = torch.randn(rows, columns, generator=generator)
            self.weights[_key(name)] = nn.Parameter(values * (scale * columns**-0.5))

        matrix("token_embd", c.vocab, c.width, 0.5)
        for layer in range(c.layers):
            blk = f"blk.{layer}"
            matrix(f"{blk}.attn_q", q, c.width)
            matrix(f"{blk}.attn_k", kv, c.width)
            matrix(f"{blk}.attn_v", kv, c.width)
            matrix(f"{blk}.attn_output", c.width, q, residual)
            matrix(f"{blk}.ffn_gate", c.ff, c.width)
            matrix(f"{blk}.ffn_up", c.ff, c.width)
            matrix(f"{blk}.ffn_down", c.width, c.ff, residual)
            for norm in ("attn_norm", "ffn_norm"):
                self.weights[_key(f"{blk}.{norm}")] = nn.Parameter(torch.ones(c.width))
        self.weights[_key("output_norm")] = nn.Parameter(torch.ones(c.width))
        angles = torch.arange(c.context)[:, None] * c.rope_base ** (
            -torch.arange(0, c.head_dim, 2) / c.head_dim
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def named_weights(self) -> dict[str, Tensor]:
        """GGUF tensor name without ".weight" -> parameter, in file order."""
        return {key.replace("-", "."): value for key, value in self.weights.items()}

    def forward(self, ids: Tensor, lora: dict[str, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Logits [batch, length, vocab] of ids [batch, length].

        lora: tensor name -> (A [rank, n_in], B [n_out, rank]), added with scale 1.
        """
        c = self.config
        batch, length = ids.shape
        x = functional.embedding(ids, self.weights[_key("token_embd")])

        def linear(name: str, x: Tensor) -> Tensor:
            weight = self.weights[_key(name)]
            y = functional.linear(x, fake_q4_0(weight) if self.quantize else weight)
            if lora and name in lora:
                a, b = lora[name]
                y = y + (x @ a.T) @ b.T
            return y

        def norm(name: str, x: Tensor) -> Tensor:
            return functional.rms_norm(x, (c.width,), self.weights[_key(name)], c.eps)

        def heads(x: Tensor, count: int) -> Tensor:
            return x.view(batch, length, count, c.head_dim).transpose(1, 2)

        for layer in range(c.layers):
            blk = f"blk.{layer}"
            h = norm(f"{blk}.attn_norm", x)
            q = self._rope(heads(linear(f"{blk}.attn_q", h), c.heads))
            k = self._rope(heads(linear(f"{blk}.attn_k", h), c.kv_heads))
            v = heads(linear(f"{blk}.attn_v", h), c.kv_heads)
            group = c.heads // c.kv_heads
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
            mixed = functional.scaled_dot_product_attention(
                q, k.to(q.dtype), v.to(q.dtype), is_causal=True
            )
            x = x + linear(f"{blk}.attn_output", mixed.transpose(1, 2).reshape(batch, length, -1))
            h = norm(f"{blk}.ffn_norm", x)
            gate = functional.silu(linear(f"{blk}.ffn_gate", h))
            x = x + linear(f"{blk}.ffn_down", gate * linear(f"{blk}.ffn_up", h))
        return functional.linear(norm("output_norm", x), self.weights[_key("token_embd")])

    def _rope(self, x: Tensor) -> Tensor:
        """Rotate pairs (2i, 2i + 1) of x [batch, heads, length, head_dim]."""
        length = x.shape[2]
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return turned.flatten(-2)


def _key(name: str) -> str:
    """ParameterDict keys may not hold dots."""
    return name.replace(".", "-")
