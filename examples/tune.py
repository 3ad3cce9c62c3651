"""Tune the bundled model from Python: python examples/tune.py

Prints the held-out loss before and after, and an answer. Writes pirate.gguf, a LoRA adapter that
llama.cpp loads, and the folder pirate.run. Two minutes of `fwdllm demo` get much further.
"""

import shutil

from fwdllm import LoRAConfig, TrainConfig, generate, tune
from fwdllm.demo import asset
from fwdllm.protocol.local import EvalResult

MODEL, OUTPUT = asset("fwdllm-tiny.gguf"), "pirate.gguf"
QUESTION = "What does a cow say?"


def show(event: object) -> None:
    """Called with every step, evaluation and checkpoint of the run."""
    if isinstance(event, EvalResult):
        print(f"step {event.step}: held-out loss {event.loss:.2f}")


def main() -> None:
    shutil.rmtree("pirate.run", ignore_errors=True)  # of an earlier try; a run is never overwritten
    result = tune(
        MODEL,
        asset("pirate.train.jsonl"),
        OUTPUT,
        lora=LoRAConfig(rank=2, alpha=4.0),
        train=TrainConfig(
            steps=40,
            batch_size=4,
            learning_rate=1e-2,
            eval_every=20,
        ),
        held_out=20,
        on_event=show,
    )
    print(f"held-out loss {result.loss_before:.2f} -> {result.loss_after:.2f}")
    answer = generate(MODEL, QUESTION, adapter=result.adapter, chat=True, max_tokens=24)
    print(f"{QUESTION} {''.join(answer).strip()}")


if __name__ == "__main__":
    main()
