"""What came of all cases: counts for a table, and the inputs that were not withstood."""

from __future__ import annotations

import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

from target import OK, REFUSED, Row

# Inputs kept of findings that look the same.
_KEPT = 2
_SHOWN_LINES = 12


class Findings:
    """Counts, and the findings so far.

    folder: for inputs; None if they are kept already: then everything is printed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._counts: dict[tuple[str, str], Counter[tuple[str, str]]] = defaultdict(Counter)
        self._alike: Counter[tuple[str, str, str, str]] = Counter()
        self._most: dict[str, tuple[float, str]] = {}

    @property
    def any(self) -> bool:
        """Whether there are findings."""
        return bool(self._alike)

    def add(
        self,
        name: str,
        seed: int | None,
        kind: str,
        rows: list[Row],
        seconds: float,
        case: Path,
    ) -> None:
        """Count what came of a case; print and keep what is new of it. seconds: for all of it."""
        longest = max(self._most.get(f"{name} seconds", (0.0, "")), (seconds, f"{name}-{seed}"))
        self._most[f"{name} seconds"] = longest
        for row in rows:
            ended = row.ended if not row.failed else "failed"
            self._counts[name, kind][row.what, ended] += 1
            where = f"{name}-{seed} {row.what}"
            for what, number in (("seconds", row.seconds), ("MB", row.peak / 1e6)):
                most = f"{name} {row.what} {what}"
                if number:
                    self._most[most] = max(self._most.get(most, (0.0, "")), (number, where))
        new = [row for row in rows if row.failed and self._is_new(name, row)]
        if self._folder is None:
            new = rows
        for row in new:
            self._print(f"{name}-{seed}", kind, row)
        if new and self._folder is not None:
            kept = self._folder / f"{name}-{seed}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(case, kept)
            print(f"again: python tests/fuzz/run.py --again {kept}\n", flush=True)

    def _is_new(self, name: str, row: Row) -> bool:
        """Whether there are few that look like it: the same end, the same last words."""
        lines = [line for line in row.output.splitlines() if line.strip()]
        assertion = [line for line in lines if "GGML_ASSERT" in line or "terminate" in line]
        last = re.sub(r"0x[0-9a-f]+|\d+|/\S+", "#", (assertion or lines or [""])[-1])[:160]
        alike = (name, row.what, row.ended, last)
        self._alike[alike] += 1
        return self._alike[alike] <= _KEPT

    def _print(self, where: str, kind: str, row: Row) -> None:
        print(f"{where} ({kind}), {row.what}: {row.ended}, {row.seconds:.1f} s")
        for line in row.output.strip().splitlines()[-_SHOWN_LINES:]:
            print(f"    {line[:300]}")

    def report(self) -> str:
        """The table: for each target and kind of input, what came of each part of a case."""
        lines = []
        for name in dict.fromkeys(name for name, _ in self._counts):
            kinds = {k: c for (n, k), c in sorted(self._counts.items()) if n == name}
            kinds["all"] = sum(kinds.values(), Counter())
            columns = list(dict.fromkeys(what for c in kinds.values() for what, _ in c))
            lines.append(f"| {name}: ok, refused, failed | " + " | ".join(columns) + " |")
            lines.append("| --- |" + " --- |" * len(columns))
            for kind, counts in kinds.items():
                cells = [
                    ", ".join(str(counts[what, ended]) for ended in (OK, REFUSED, "failed"))
                    for what in columns
                ]
                lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        for what, (number, where) in self._most.items():
            lines.append(f"most {what}: {number:.1f} ({where})")
        for (name, part, ended, last), n in self._alike.most_common():
            lines.append(f"{n} times: {name} {part}: {ended}: {last}")
        return "\n".join(lines) + f"\n{sum(self._alike.values())} findings"
