# SPDX-License-Identifier: LGPL-2.1-or-later
"""Coroutines in synchronous tests."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_async(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end in a loop of its own; AssertionError if it leaves tasks behind."""

    async def main() -> Result:
        result = await coroutine
        # What has been cancelled ends in the next turn of the loop.
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"
        return result

    return asyncio.run(main())
