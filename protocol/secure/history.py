"""What all clients of a sum must have been told alike: the run's settings, and its updates.

A server that tells others another adapter, one along which nothing changes, knows what they add to
a sum, and the rest is the scalars of one client (Pasquini et al., arXiv 2111.07380). So masks
depend on what a client was told, and only equal ones fall out of a sum. A digest of the adapter
would be of less use: devices may differ in its last bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable

from fwdllm.protocol.records import FORMAT, Meta


def beginning(meta: Meta) -> bytes:
    """A run before its first update: 32 bytes. What only the server knows of it does not count."""
    text = dataclasses.replace(meta, noise_seed=0, format=FORMAT).to_json()
    settings = json.loads(text, parse_float=_number)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()


def after(history: bytes, updates: Iterable[bytes]) -> bytes:
    """A history with further updates, as ``wire.encode_update`` gives them: 32 bytes."""
    for update in updates:
        history = hashlib.sha256(history + update).digest()
    return history


def _number(text: str) -> float:
    """1.0 as 1: whether a setting was written as one or the other does not matter."""
    value = float(text)
    return int(value) if value.is_integer() else value
