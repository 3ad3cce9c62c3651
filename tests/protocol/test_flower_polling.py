"""How long a node or a server waits before it looks again."""

from __future__ import annotations

import pytest

from fwdllm.protocol.flower import polling


@pytest.mark.parametrize(
    ("waited", "took", "usual", "expected"),
    [
        (0.0, 0.0, 0.0, 0.1),
        (4.0, 0.01, 0.0, 1.0),
        (600.0, 0.01, 0.0, 3.0),
        (4.0, 0.5, 0.0, 15.0),  # a busy server
        (4.0, 900.0, 0.0, 30.0),  # one that was away
        (0.0, 0.01, 2.0, 1.2),  # the last message took two seconds to come
        (1.2, 0.01, 2.0, 0.3),
        (0.0, 0.01, 600.0, 3.0),
    ],
)
def test_pauses(
    monkeypatch: pytest.MonkeyPatch, waited: float, took: float, usual: float, expected: float
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(polling.time, "sleep", slept.append)
    polling.pause(waited, took, usual)
    assert slept == [pytest.approx(expected)]
