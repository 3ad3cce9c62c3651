"""The ServerApp: opens or creates the run's ledger and lets the strategy finish the run."""

from __future__ import annotations

import secrets
from logging import INFO
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.data.jsonl import check_labels, read_jsonl
from fwdllm.engine.engine import Engine
from fwdllm.engine.files import fingerprint
from fwdllm.protocol.flower.messages import Settings
from fwdllm.protocol.flower.strategy import FwdLLMStrategy
from fwdllm.protocol.ledger import open_run
from fwdllm.protocol.records import Meta
from fwdllm.protocol.replay import verify

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the federation, then write adapter.gguf beside its ledger."""
    settings = Settings.of(context.run_config)
    engine = settings.engine(settings.model)
    folder = Path(settings.run_dir)
    with open_run(folder, _meta(settings, engine), None) as ledger:
        verify(ledger)  # what somebody has changed is not gone on with
        strategy = FwdLLMStrategy(ledger, settings.min_nodes)
        engine.adapter = strategy.server.replica.space.adapter
        strategy.start(
            grid,
            strategy.arrays,
            num_rounds=strategy.rounds_left,
            timeout=settings.federation.deadline,
            evaluate_fn=_evaluation(settings, strategy, engine) if settings.eval_data else None,
        )
        save_gguf(engine.adapter, folder / "adapter.gguf")
        if ledger.journal is not None:
            head, key = ledger.journal.head.hash, ledger.journal.key
            log(INFO, "Ledger's head %s, signed by key %s", head.hex(), key.hex())


def _meta(settings: Settings, engine: Engine) -> Meta:
    assert engine.adapter is not None
    return Meta.of(
        settings.federation,
        engine.adapter,
        settings.federation.seed,
        fingerprint(*engine.file.paths),
        secrets.randbits(64),
    )


def _evaluation(settings: Settings, strategy: FwdLLMStrategy, engine: Engine) -> object:
    """What Flower calls before the first round and after each: a held-out evaluation when due."""
    examples = read_jsonl(Path(settings.eval_data))
    if settings.labels:
        check_labels(examples, settings.labels)
    config, server = settings.federation, strategy.server

    def evaluate(_: int, __: ArrayRecord) -> MetricRecord | None:
        every = config.eval_every
        if not (server.done or (every and server.round % every == 0)):
            return None
        found = engine.evaluate(examples, config.max_tokens)
        server.ledger.evaluated(server.round, found.loss, found.accuracy, found.n_examples)
        accuracy = {} if found.accuracy is None else {"accuracy": found.accuracy}
        return MetricRecord({"round": server.round, "loss": found.loss, **accuracy})

    return evaluate
