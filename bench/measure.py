"""Measurements of whole passes and steps: this engine and a peer, in turns.

Results are JSON values. "settings" says what was measured. Times are medians over rounds;
"..._range" has the lowest and the highest. "ratio" is this engine's speed over the peer's, the
median over rounds.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fwdllm.bench.inputs import linear_targets, open_decoder, random_ids
from fwdllm.bench.worker import Answer, Worker
from fwdllm.engine.backends import OWN
from fwdllm.engine.errors import ConfigError, FwdllmError
from fwdllm.engine.estimators.plan import n_lanes
from fwdllm.engine.settings import OWN_METHODS

PROMPT_PEERS = ("llama.cpp", "plain", OWN)
DIFFERENCE_PEERS = ("llama.cpp", "llama-cpp-python", "peft")
STEP_PEERS = ("plain", "central", "unscoped", OWN, *DIFFERENCE_PEERS)

_PROMPT, _STEP = "fwdllm.bench.ours:Prompt", "fwdllm.bench.ours:Step"
_PLAIN_STEP = "fwdllm.bench.ours:PlainStep"
_LLAMA_PROMPT, _LLAMA_STEP = "fwdllm.bench.llama_peer:Prompt", "fwdllm.bench.llama_peer:Step"
_PEFT_STEP = "fwdllm.bench.peft_peer:Step"


def measure_prompt(
    model: Path, tokens: int, lanes: int, backend: str, peer: str | None, rounds: int
) -> dict[str, Any]:
    """Measure a prompt of random tokens under ``lanes`` variants of an adapter.

    Tokens are counted in every lane.  lanes: 1, or an even number for central differences.
    backend: see ``Engine.load``.
    Errors: ConfigError, ModelError.
    """
    _check(peer, PROMPT_PEERS, rounds)
    if lanes < 1 or (lanes > 1 and lanes % 2):
        raise ConfigError(f"--lanes must be 1 or an even number, not {lanes}")
    if peer == "plain" and lanes == 1:
        raise ConfigError("the peer plain shows what perturbing costs, which takes --lanes")
    _check_own(peer, backend)
    ids = random_ids(open_decoder(model, tokens, backend), 1, tokens + 1)[0]
    settings = {"model": model.name, "tokens": tokens, "lanes": lanes, "backend": backend}
    settings["rounds"] = rounds
    prompt: dict[str, Any] = {"model": str(model), "ids": ids}
    with ExitStack() as stack:
        mine = {**prompt, "lanes": lanes, "backend": backend}
        ours = stack.enter_context(Worker(_PROMPT, mine))
        workers, n_tokens = [ours], [tokens * lanes]
        if peer == "llama.cpp":
            options = {**prompt, "threads": ours.facts["threads"]}
            workers.append(stack.enter_context(Worker(_LLAMA_PROMPT, options)))
            n_tokens.append(tokens)
        elif peer is not None:
            options = {**mine, "plain": True} if peer == "plain" else {**mine, "backend": peer}
            workers.append(stack.enter_context(Worker(_PROMPT, options)))
            n_tokens.append(tokens * lanes)
        answers = _alternate(workers, rounds)
        return _result("prompt", settings, peer, workers, answers, n_tokens, n_tokens)


@dataclass(frozen=True)
class StepConfig:
    """One step of tuning.

    targets: matrices to adapt; None: every linear layer's.  scope: layers to perturb; None: all.
    memory_budget: in bytes.  backend: see ``Engine.load``.
    """

    examples: int = 4
    tokens: int = 64
    perturbations: int = 8
    method: str = "forward-ad"
    rank: int = 8
    targets: tuple[str, ...] | None = ("attn_q", "attn_v")
    scope: tuple[int, ...] | None = None
    memory_budget: int | None = None
    backend: str = OWN

    @property
    def n_tokens(self) -> int:
        """Lane-tokens of a step; ConfigError for a method that does not exist."""
        return self.examples * self.tokens * n_lanes(self.method, self.perturbations)


def measure_step(model: Path, config: StepConfig, peer: str | None, rounds: int) -> dict[str, Any]:
    """Measure directional derivatives of random examples and an update of the adapter.

    "breakdown" in the result has the seconds of one further step by operation.
    Errors: ConfigError, ModelError.
    """
    _check(peer, STEP_PEERS, rounds)
    _check_own(peer, config.backend)
    if config.examples < 1 or config.perturbations < 1:
        raise ConfigError("--examples and --perturbations must be at least 1")
    if peer in DIFFERENCE_PEERS and config.method in OWN_METHODS:
        raise ConfigError(f"the peer {peer} takes differences: choose --method central")
    n_tokens = [config.n_tokens, config.n_tokens]
    file = open_decoder(model, config.tokens, config.backend)
    config = replace(config, targets=config.targets or linear_targets(file))
    step = {
        "model": str(model),
        "ids": random_ids(file, config.examples, config.tokens),
        "lora": {"rank": config.rank, "targets": config.targets},
        "perturbations": config.perturbations,
        "method": config.method,
    }
    with ExitStack() as stack:
        ours = {name: getattr(config, name) for name in ("scope", "memory_budget", "backend")}
        ours = {**step, **ours}
        workers = [stack.enter_context(Worker(_STEP, ours))]
        if peer == "plain":
            workers.append(stack.enter_context(Worker(_PLAIN_STEP, ours)))
        elif peer == "central":
            workers.append(stack.enter_context(Worker(_STEP, {**ours, "method": peer})))
            n_tokens[1] = replace(config, method=peer).n_tokens
        elif peer == OWN:
            workers.append(stack.enter_context(Worker(_STEP, {**ours, "backend": OWN})))
        elif peer == "unscoped":
            workers.append(stack.enter_context(Worker(_STEP, {**ours, "scope": None})))
        elif peer is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=_memory_folder()))
            theirs = {**step, "threads": workers[0].facts["threads"], "folder": folder}
            if peer == "peft":
                worker = _open_peft(theirs)
            else:
                worker = Worker(_LLAMA_STEP, {**theirs, "reopen": peer == "llama-cpp-python"})
            workers.append(stack.enter_context(worker))
        answers = _alternate(workers, rounds)
        settings = {"model": model.name, **asdict(config), "rounds": rounds}
        n_tokens = n_tokens[: len(workers)]
        result = _result("step", settings, peer, workers, answers, n_tokens, [1] * len(workers))
        return {**result, "breakdown": workers[0].call("breakdown")}


def _open_peft(options: Mapping[str, Any]) -> Worker:
    """The PEFT peer, with weights decoded to whichever type is faster on this machine."""
    for package in ("torch", "transformers", "peft", "psutil"):
        if find_spec(package) is None:
            raise ConfigError(f"the peer peft needs the package {package}; install fwdllm[test]")
    seconds: dict[str, float] = {}
    for dtype in ("bfloat16", "float32"):
        try:
            with Worker(_PEFT_STEP, {**options, "dtype": dtype}) as worker:
                seconds[dtype] = worker.run().seconds
        except FwdllmError as error:  # one of the types may not fit the memory
            reason = error
    if not seconds:
        raise reason
    return Worker(_PEFT_STEP, {**options, "dtype": min(seconds, key=lambda dtype: seconds[dtype])})


def _memory_folder() -> str | None:
    """A folder for temporary files in memory, or None if the system has none."""
    folder = Path("/dev/shm")
    return str(folder) if folder.is_dir() else None


def _check(peer: str | None, peers: Sequence[str], rounds: int) -> None:
    if peer is not None and peer not in peers:
        raise ConfigError(f"--peer must be one of {', '.join(peers)}, not {peer!r}")
    if rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, not {rounds}")


def _check_own(peer: str | None, backend: str) -> None:
    if peer == OWN and backend == OWN:
        raise ConfigError(f"the peer {OWN} is what --backend llama.cpp can be compared with")


def _alternate(workers: Sequence[Worker], rounds: int) -> list[list[Answer]]:
    """Run all sides in turns; their answers, [worker][round]."""
    answers: list[list[Answer]] = [[] for _ in workers]
    for _ in range(rounds):
        for worker, mine in zip(workers, answers, strict=True):
            mine.append(worker.run())
    return answers


def _result(
    command: str,
    settings: Mapping[str, Any],
    peer: str | None,
    workers: Sequence[Worker],
    answers: Sequence[Sequence[Answer]],
    n_tokens: Sequence[int],
    work: Sequence[int],
) -> dict[str, Any]:
    """The result of a measurement. work: of each side in a round, in a common unit."""
    machine = {name: workers[0].facts[name] for name in ("isa", "threads")}
    ours, *others = [
        {**{k: v for k, v in worker.facts.items() if k not in machine}, **_figures(mine, n)}
        for worker, mine, n in zip(workers, answers, n_tokens, strict=True)
    ]
    result = {"command": command, "settings": {**settings, **machine}, **ours}
    if not others:
        return {**result, "peer": None, "ratio": None}
    ratios = [
        (work[0] / mine.seconds) / (work[1] / theirs.seconds)
        for mine, theirs in zip(*answers, strict=True)
    ]
    return {
        **result,
        "peer": {"name": peer, **others[0]},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def _figures(answers: Sequence[Answer], n_tokens: int) -> dict[str, Any]:
    seconds = [answer.seconds for answer in answers]
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "tokens_per_s": n_tokens / statistics.median(seconds),
        "tokens_per_s_range": [n_tokens / max(seconds), n_tokens / min(seconds)],
        "peak_rss_bytes": answers[-1].peak_rss_bytes,
        **(answers[-1].value or {}),
    }
