"""What server and clients send each other for secure aggregation; ``protocol.wire`` encodes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from fwdllm.engine.errors import FwdllmError


class SecureError(FwdllmError):
    """A step of secure aggregation that may not be taken, or that too few clients have taken."""


class Stage(IntEnum):
    """The steps of a part: what the server asks for, and the client answers with.

    KEYS: public keys.  SHARES: from all keys, the client's secrets in shares, sealed for each
    other.  VECTOR: from the shares that others have sealed for it, its masked vector.  OPENING:
    from the numbers of those whose vectors have come, what takes the masks off their sum.
    """

    KEYS = 0
    SHARES = 1
    VECTOR = 2
    OPENING = 3


@dataclass(frozen=True)
class Letter:
    """A message of a stage in either direction. rows: by client, each with as many bytes."""

    round: int
    part: int
    stage: Stage
    rows: Mapping[int, bytes]
