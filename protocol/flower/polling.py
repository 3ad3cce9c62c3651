"""How long to wait before one looks again, where nothing tells that there is something new."""

from __future__ import annotations

import time

# Flower's own programs look every three seconds. Here at most a quarter of the waiting so far is
# lost, and a wait of a minute takes 35 looks instead of 20.
_SHARE, _LEAST, _MOST = 0.25, 0.1, 3.0


def pause(waited: float) -> None:
    """Sleep until the next look. waited: seconds since the waiting began."""
    time.sleep(min(max(_SHARE * waited, _LEAST), _MOST))
