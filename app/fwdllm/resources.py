"""Memory: how much this process uses or has used, and amounts of memory as people write them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
# A bare letter means a power of two, as for dd and systemd.
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _UNITS |= {f"{_letter}b": 1000**_power}
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power}


def parse_bytes(text: str) -> int:
    """An amount of memory in bytes: "1GiB", "1.5G" (of 1024^3), "900MB" (of 1000^2), "123456".

    Errors: ConfigError for anything else, and for less than a byte.
    """
    match = _AMOUNT.fullmatch(text.strip().lower())
    amount = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if amount < 1:
        from fwdllm.engine.errors import ConfigError  # slow to import, and errors are rare

        raise ConfigError(f'an amount of memory is like "1GiB", "900MB" or "1.5G", not {text!r}')
    return amount


def rss_bytes() -> int | None:
    """Resident bytes of this process, with mapped weights; None if the system does not tell."""
    return _of_status("VmRSS")


def peak_rss_bytes() -> int:
    """The most bytes this process has had resident, mapped weights included."""
    # getrusage would count what the parent process had resident before exec, too.
    peak = _of_status("VmHWM")
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return peak


def _of_status(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None
