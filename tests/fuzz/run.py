"""Throw changed inputs at everything that reads them, and keep those that are not withstood.

    python tests/fuzz/run.py                                   # all targets, for half an hour
    python tests/fuzz/run.py models --first 0 --count 2000     # the models of these seeds
    python tests/fuzz/run.py --again build/fuzz/models-17      # a kept one

A case is made of a target's name and a number, so it is the same on every machine that has the
same sound inputs. It runs in a child that may die, hang or fill the memory. Exit code 1: findings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

os.environ.setdefault("FWDLLM_NUM_THREADS", "1")  # each core has a process
os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a debugger would write it, for seconds
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))

from children import Ended, isolate, kill, processor_seconds, resident  # noqa: E402
from findings import Findings  # noqa: E402
from target import Row, Target  # noqa: E402

# Memory of a child beyond its parent's.
MEMORY = 2 << 30
# How much longer than it computes a case may take, as others use the machine too.
PATIENCE = 4


def targets() -> dict[str, Target]:
    """All by name."""
    from fuzz_adapters import ADAPTERS
    from fuzz_gguf import GGUF
    from fuzz_grammars import GRAMMARS
    from fuzz_http import HTTP
    from fuzz_jsonl import JSONL
    from fuzz_ledger import LEDGER
    from fuzz_models import MODELS
    from fuzz_wire import WIRE

    return {
        "gguf": GGUF,
        "models": MODELS,
        "adapters": ADAPTERS,
        "jsonl": JSONL,
        "wire": WIRE,
        "ledger": LEDGER,
        "http": HTTP,
        "grammars": GRAMMARS,
    }


@dataclass
class Chunk:
    """Cases of a target that are left to do: seeds, or a folder with an input."""

    name: str
    target: Target
    seeds: list[int]
    again: Path | None = None


@dataclass
class Lane:
    """A child at work on a chunk. seed, kind: of its case now; None between cases."""

    pid: int
    results: int
    chunk: Chunk
    folder: Path
    seed: int | None = None
    kind: str = ""
    began: float = 0.0
    computed: float = 0.0
    text: bytes = b""
    fault: str | None = field(default=None)
    stopped: bool = False  # at the end of the time, between cases

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def case(self) -> Path:
        return self.folder / f"case-{self.seed}"


def start(chunk: Chunk, common: Path, folder: Path) -> Lane:
    """Fork a child for a chunk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log").unlink(missing_ok=True)
    reads, writes = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writes)
        return Lane(pid, reads, chunk, folder)
    code = 1
    with contextlib.suppress(BaseException):
        os.close(reads)
        isolate(folder / "log")
        try:
            work(chunk, common, folder, writes)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def work(chunk: Chunk, common: Path, folder: Path, results: int) -> None:
    """What a child does: all cases of a chunk, telling of each before and after it."""

    def tell(**what: object) -> None:
        os.write(results, json.dumps(what).encode() + b"\n")

    with chunk.target.open(common) as opened:
        for seed in chunk.seeds:
            case = folder / f"case-{seed}"  # the parent removes it
            if chunk.again is None:
                case.mkdir()
                random = Random(f"{chunk.name} {seed}")
                kind = chunk.target.write(random, common, case)
            else:
                shutil.copytree(chunk.again, case)
                kind = "again"
            tell(seed=seed, kind=kind)
            tell(rows=chunk.target.check(opened, case))


class Runner:
    """All lanes. common: folder of what cases share, a folder in it for each target."""

    def __init__(self, common: Path, folder: Path, jobs: int, findings: Findings) -> None:
        self._common, self._folder, self._jobs, self._findings = common, folder, jobs, findings
        self._lanes: list[Lane] = []

    def run(self, chunks: Iterator[Chunk], until: float) -> None:
        """Do all chunks, or as many as there is time for: ``until`` of the monotonic clock."""
        try:
            self._run(chunks, until)
        finally:
            for lane in self._lanes:
                kill(lane.pid)

    def _run(self, chunks: Iterator[Chunk], until: float) -> None:
        places = [self._folder / str(i) for i in range(self._jobs)]
        left: list[Chunk] = []  # of children that died
        while True:
            while len(self._lanes) < self._jobs and time.monotonic() < until:
                chunk = left.pop() if left else next(chunks, None)
                if chunk is None:
                    break
                used = {lane.folder for lane in self._lanes}
                place = next(p for p in places if p not in used)
                self._lanes.append(start(chunk, self._common / chunk.name, place))
            if not self._lanes:
                return
            ready, _, _ = select.select([lane.results for lane in self._lanes], [], [], 0.1)
            for lane in list(self._lanes):
                if lane.results in ready and not self._read(lane):
                    left += self._end(lane)
                else:
                    self._watch(lane, until)

    def _read(self, lane: Lane) -> bool:
        """Take what a child tells; False at its end."""
        found = os.read(lane.results, 1 << 20)
        *lines, lane.text = (lane.text + found).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "rows" in told:
                self._done(lane, [Row(*row) for row in told["rows"]])
            else:
                lane.seed, lane.kind = told["seed"], told["kind"]
                lane.began, lane.computed = time.monotonic(), processor_seconds(lane.pid)
        return bool(found)

    def _done(self, lane: Lane, rows: list[Row]) -> None:
        seconds = time.monotonic() - lane.began
        self._findings.add(lane.chunk.name, lane.seed, lane.kind, rows, seconds, lane.case)
        shutil.rmtree(lane.case, ignore_errors=True)
        lane.chunk.seeds.remove(lane.seed)
        lane.seed = None

    def _watch(self, lane: Lane, until: float) -> None:
        now, seconds = time.monotonic(), lane.chunk.target.seconds
        if lane.seed is not None and lane.fault is None:
            computed = processor_seconds(lane.pid) - lane.computed
            if computed > seconds or now - lane.began > PATIENCE * seconds:
                lane.fault = "hang"
            elif resident(lane.pid) > MEMORY + resident(os.getpid()):
                lane.fault = "memory"
        lane.stopped = now > until and lane.seed is None
        if lane.fault is not None or lane.stopped:
            kill(lane.pid)

    def _end(self, lane: Lane) -> list[Chunk]:
        """What is left of the chunk of a child that has ended."""
        self._lanes.remove(lane)
        os.close(lane.results)
        kill(lane.pid)
        _, status, used = os.wait4(lane.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        text = lane.log.read_text(errors="replace")
        if lane.stopped:  # if it has begun another meanwhile, that says nothing
            return []
        if lane.seed is None:
            if code > 0:  # not by a case
                sys.exit(f"the target {lane.chunk.name} cannot be used: {text}")
            return []
        seconds = time.monotonic() - lane.began
        ended = Ended(
            code if code >= 0 else None,
            None if code >= 0 else -code,
            lane.fault == "hang",
            lane.fault == "memory",
            seconds,
            used.ru_maxrss * 1024,
            text,
        )
        row = Row("process", ended.fault or "ended", seconds, ended.peak, text)
        self._done(lane, [row])
        return [lane.chunk] if lane.chunk.seeds else []


def chunks_of(known: dict[str, Target], first: int, count: int) -> Iterator[Chunk]:
    """Chunks of these seeds of all targets, in turn."""
    begun, end = dict.fromkeys(known, first), first + count
    while any(start < end for start in begun.values()):
        for name, target in known.items():
            start, begun[name] = begun[name], min(begun[name] + target.chunk, end)
            if start < end:
                yield Chunk(name, target, list(range(start, begun[name])))


def main() -> int:
    """Run; returns the exit code."""
    known = targets()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(known)}; all if none is named")
    parser.add_argument("--first", type=int, help="the first seed; a random one if not given")
    parser.add_argument("--count", type=int, help="seeds of each target; else --minutes")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--again", type=Path, help="run a kept input again")
    given = parser.parse_args()
    names = [given.again.name.rsplit("-", 1)[0]] if given.again else given.targets or list(known)
    if unknown := set(names) - set(known):
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = {name: known[name] for name in names}
    first = Random().randrange(10**9) if given.first is None else given.first
    until = float("inf")
    if given.again:
        chunks = iter([Chunk(name, t, [0], given.again) for name, t in chosen.items()])
    else:
        if given.count is None:
            until = time.monotonic() + 60 * given.minutes
        chunks = chunks_of(chosen, first, given.count or 10**9)
        print(f"seeds from {first}", flush=True)
    findings = Findings(None if given.again else given.out)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))  # children must not remove it at their ends
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # remembers files that were tried
    try:
        common = folder / "common"
        for name, target in chosen.items():
            (common / name).mkdir(parents=True)
            target.make(common / name)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            Runner(common, folder / "lanes", given.jobs, findings).run(chunks, until)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(findings.report())
    return int(findings.any)


if __name__ == "__main__":
    sys.exit(main())
