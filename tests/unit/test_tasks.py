# SPDX-License-Identifier: LGPL-2.1-or-later
"""Background tasks last until they are done."""

import asyncio
import gc

from loopd.tasks import Tasks
from tests.harness.asynchronous import run_async


def test_a_task_that_only_waits_for_itself_is_kept() -> None:
    """Transport rule 6 (handlers): a strong reference; the event loop's own is a weak one."""

    async def body() -> None:
        ended = []

        async def wait() -> None:
            try:
                # Nobody else has this future: without the task both are garbage.
                await asyncio.get_running_loop().create_future()
            finally:
                ended.append(True)

        tasks = Tasks()
        tasks.start(wait())
        await asyncio.sleep(0)
        gc.collect()
        await asyncio.sleep(0)
        assert ended == []
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
        assert ended == [True]

    run_async(body())
