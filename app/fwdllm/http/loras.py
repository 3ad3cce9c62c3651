"""Adapters by the numbers that llama.cpp's server gives them, and several of them at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from fwdllm.http.api_error import ApiError
from fwdllm.http.schemas import LoraScale
from fwdllm.http.store import AdapterRow, Store

# Adapters of a request and their scales.
Mix = tuple[tuple[AdapterRow, float], ...]


class Loras:
    """The adapters of a store by number, and what requests use that name none.

    Numbers count from 0: first the ``given`` adapters, then all others from old to new. An adapter
    keeps its number while the server runs. Of ``given`` the first is used by requests that name no
    model. Threads may share it.
    """

    def __init__(self, store: Store, given: Sequence[AdapterRow]) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._ids = {adapter.number: id for id, adapter in enumerate(given)}
        self._scales = {adapter.number: 1.0 for adapter in given[:1]}

    def listed(self) -> dict[int, AdapterRow]:
        """The adapters by number, without checkpoints."""
        rows = {row.number: row for row in self._store.adapters() if row.step is None}
        with self._lock:
            for number in sorted(rows):
                self._ids.setdefault(number, len(self._ids))
            return {id: rows[number] for number, id in self._ids.items() if number in rows}

    def mix(self, scales: Sequence[LoraScale]) -> Mix:
        """The adapters of these numbers. Errors: ApiError 400."""
        listed, found = self.listed(), {}
        for i, wanted in enumerate(scales):
            if wanted.id not in listed:
                text = f"there is no adapter {wanted.id}; /lora-adapters lists them"
                raise ApiError(400, text, f"lora.{i}.id", "adapter_not_found")
            if wanted.id in found:
                raise ApiError(400, f"adapter {wanted.id} is there twice", f"lora.{i}.id")
            found[wanted.id] = (listed[wanted.id], wanted.scale)
        return tuple(part for part in found.values() if part[1] != 0)

    def use(self, mix: Mix) -> None:
        """Use these adapters from now on for requests that name none."""
        self._scales = {adapter.number: scale for adapter, scale in mix}

    @property
    def default(self) -> Mix:
        """What requests use that name no model and no adapters."""
        found = ((self._store.adapter_of_number(n), scale) for n, scale in self._scales.items())
        return tuple((adapter, scale) for adapter, scale in found if adapter is not None)

    def scale(self, adapter: AdapterRow) -> float:
        """The scale of an adapter in ``default``."""
        return self._scales.get(adapter.number, 0.0)
