"""Which instruction set is fastest on a machine: measured at first use, kept in a cache file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fwdllm.kernels import machine

_FILE, _REMEMBERED = "instruction-set.json", 64
# Slower wherever one of the others is there, so not measured.
_FALLBACKS = ("avx2", "portable")
# By so much another has to be faster than the one that should be, so that noise does not choose
# between two that are alike: results differ in their rounding.
_FASTER = 1.25


def use_fastest(native: Any) -> str:
    """Make the kernels use what FWDLLM_ISA names, or else what is fastest here; its name.

    native: the module of the kernels.
    """
    if not os.environ.get("FWDLLM_ISA"):
        native.use_isa(_fastest(native))
    return str(native.isa())


def _fastest(native: Any) -> str:
    contenders = [name for name in native.isas if name not in _FALLBACKS]
    if len(contenders) < 2:
        return str(native.isas[0])
    key = _key(native, contenders)
    known = machine.remembered(_FILE).get(key)
    if known in contenders:
        return str(known)
    seconds = native.product_seconds(contenders)  # some 30 ms
    chosen = best(dict(zip(contenders, seconds, strict=True)))
    machine.remember(_FILE, key, chosen, _REMEMBERED)
    return chosen


def best(seconds: Mapping[str, float]) -> str:
    """The first of some instruction sets, or the fastest if that is much faster.

    seconds: of the same work, by each.
    """
    first, fastest = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return fastest if seconds[first] > _FASTER * seconds[fastest] else first


def _key(native: Any, contenders: list[str]) -> str:
    """Identifies this build of the kernels and the processor. Not the number of threads, which must
    not change a result."""
    built = Path(native.__file__).stat()
    facts = [contenders, built.st_size, built.st_mtime_ns, machine.processor()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
