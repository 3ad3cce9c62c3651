"""Train the tokenizer and the model on the generated corpus, on one CPU core.

The last part of the run sees its weights rounded to Q4_0 (quantization-aware), so that the
exported file loses next to nothing. Needs PyTorch and tokenizers, for this script only.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np

try:
    import tokenizers
    import torch
    from torch.nn import functional
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "training the bundled model needs PyTorch and tokenizers: pip install torch tokenizers"
    ) from error

from bundled_model.corpus import documents
from bundled_model.model import Config, Llama

END, PAD = "<|endoftext|>", "<|pad|>"
END_ID, PAD_ID = 0, 1
HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True)
class Recipe:
    """How long and how fast. tokens_per_step is split into windows of ``lengths`` in turn."""

    steps: int = 1000
    tokens_per_step: int = 2048
    lengths: tuple[int, ...] = (128, 128, 256, 128, 128, 128, 512, 128)
    peak_rate: float = 4e-3
    final_rate: float = 3e-5
    warmup: int = 50
    weight_decay: float = 0.1
    quantize_from: float = 0.85  # share of the run after which weights are rounded to Q4_0
    corpus_documents: int = 50_000
    seed: int = 1


def train_tokenizer(texts: list[str], vocab: int) -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2; ids 0 and 1 are the end-of-text and padding tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> np.ndarray:
    """int64 ids of all documents, each begun by the end-of-text token, and one at the end."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.append(END_ID)
        ids.extend(encoding.ids)
    ids.append(END_ID)
    return np.array(ids, np.int64)


def windows(
    stream: np.ndarray, starts: np.ndarray, length: int, count: int, rng: Random
) -> torch.Tensor:
    """[count, length + 1] ids, each window beginning with a document (as at inference)."""
    last = int(np.searchsorted(starts, len(stream) - length - 1, side="right"))
    chosen = [int(starts[rng.randrange(last)]) for _ in range(count)]
    return torch.from_numpy(np.stack([stream[s : s + length + 1] for s in chosen]))


def rate(step: int, recipe: Recipe) -> float:
    """Linear warmup, then a cosine from the peak to the final rate."""
    if step < recipe.warmup:
        return recipe.peak_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return recipe.final_rate + (recipe.peak_rate - recipe.final_rate) * cosine


def loss_of(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    """Mean NLL in nats per token of windows [count, length + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def _optimizers(model: Llama, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    Muon's update is scaled to the size of AdamW's, so that one schedule serves both.
    """
    named = model.named_weights()
    inner = [w for name, w in named.items() if w.ndim == 2 and name != "token_embd"]
    outer = [w for name, w in named.items() if w.ndim == 1 or name == "token_embd"]
    decay, rate = recipe.weight_decay, recipe.peak_rate
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(
    config: Config, recipe: Recipe, checkpoint: Path | None = None
) -> tuple[Llama, tokenizers.Tokenizer]:
    """Train from scratch; the state goes to ``checkpoint`` (a .pt file) every 200 steps."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    rng = Random(recipe.seed)
    texts = list(islice(documents(recipe.seed), recipe.corpus_documents))
    tokenizer = train_tokenizer(texts[:30_000], config.vocab)
    stream = token_stream(tokenizer, texts)
    starts = np.flatnonzero(stream == END_ID)
    held_out = token_stream(tokenizer, list(islice(documents(HELD_OUT_SEED), 400)))
    span = min(256, config.context)
    probe = windows(held_out, np.flatnonzero(held_out == END_ID), span, 16, Random(0))
    print(f"{len(stream)} tokens in {len(starts) - 1} documents", flush=True)

    model = Llama(config, recipe.seed)
    optimizers = _optimizers(model, recipe)
    began, seen = time.monotonic(), 0
    for step in range(recipe.steps):
        model.quantize = step >= recipe.quantize_from * recipe.steps
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate(step, recipe)
        length = min(recipe.lengths[step % len(recipe.lengths)], config.context)
        count = max(1, recipe.tokens_per_step // length)
        loss = loss_of(model, windows(stream, starts, length, count, rng))
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen += length * count
        if step % 100 == 99 or step == recipe.steps - 1:
            with torch.no_grad():
                held = loss_of(model, probe).item()
            speed = f"{seen / (time.monotonic() - began):.0f} tokens/s"
            print(f"step {step + 1}: {loss.item():.3f}, held-out {held:.3f}, {speed}", flush=True)
        if checkpoint and step % 200 == 199:
            state = {"model": model.state_dict(), "step": step + 1, "bpe": tokenizer.to_str()}
            torch.save(state, checkpoint)
    model.quantize = True
    return model, tokenizer
