"""Costly work of requests is done in turns, and leaves most of the machine to others."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

pytest.importorskip("fastapi")

from fwdllm.http.api_error import ApiError
from fwdllm.http.queue import Turns


def test_work_is_one_at_a_time_with_a_rest() -> None:
    at_work, begun = 0, list[float]()

    async def work(turns: Turns) -> None:
        nonlocal at_work
        async with turns.turn():
            begun.append(time.perf_counter())
            at_work += 1
            assert at_work == 1
            await asyncio.sleep(0.02)
            at_work -= 1

    async def all_of_them() -> None:
        turns = Turns(3)
        await asyncio.gather(*(work(turns) for _ in range(3)))

    asyncio.run(all_of_them())
    assert all(later - first >= 0.2 for first, later in pairwise(begun))


def test_an_error_passes_the_turn_on() -> None:
    async def fail(turns: Turns) -> None:
        async with turns.turn():
            raise ValueError("of one")

    async def both() -> None:
        turns = Turns(1)
        for _ in range(2):
            with pytest.raises(ValueError, match="of one"):
                await fail(turns)

    asyncio.run(asyncio.wait_for(both(), 10))


def test_more_than_may_wait_are_refused() -> None:
    async def many() -> None:
        turns = Turns(1)
        async with turns.turn():
            with pytest.raises(ApiError) as refused:
                async with turns.turn():
                    pass
        assert refused.value.status == 429

    asyncio.run(many())
