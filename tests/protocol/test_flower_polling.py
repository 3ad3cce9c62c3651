"""How long a node or a server waits before it looks again."""

from __future__ import annotations

import pytest

from fwdllm.protocol.flower import polling


@pytest.mark.parametrize(
    ("waited", "took", "expected"),
    [
        (0.0, 0.0, 0.1),
        (4.0, 0.01, 1.0),
        (600.0, 0.01, 3.0),
        (4.0, 0.5, 15.0),  # a busy server
        (4.0, 900.0, 30.0),  # one that was away
    ],
)
def test_pauses(
    monkeypatch: pytest.MonkeyPatch, waited: float, took: float, expected: float
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(polling.time, "sleep", slept.append)
    polling.pause(waited, took)
    assert slept == [pytest.approx(expected)]
