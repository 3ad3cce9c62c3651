"""How long to wait before one looks again, where nothing tells that there is something new."""

from __future__ import annotations

import time

# Flower's own programs look every three seconds. Here at most a quarter of the waiting so far is
# lost, and a wait of a minute takes 35 looks instead of 20.
_SHARE, _LEAST, _MOST = 0.25, 0.1, 3.0
# Rounds are alike: who waited two seconds for the last message need not look in the first 1.2.
_SURE = 0.6
# A look that takes long tells of a server with many others: 200 nodes that look every three seconds
# are all that one can do. Each then looks a thirtieth of the time, and the server has half of its.
# A look that had to wait for a server to come back tells nothing, so the pause has a limit.
_BUSY, _LONGEST = 30.0, 30.0


def pause(waited: float, took: float = 0.0, usual: float = 0.0) -> None:
    """Sleep until the next look.

    waited: seconds since the waiting began.  took: of them those that the last look took.  usual:
    how many the last waiting had, 0: there was none.
    """
    wanted = min(max(_SHARE * waited, _LEAST, _SURE * usual - waited), _MOST)
    time.sleep(max(wanted, min(_BUSY * took, _LONGEST)))
