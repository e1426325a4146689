# SPDX-License-Identifier: LGPL-2.1-or-later
"""When loopctl has an agent in the terminal, and what that is told; tests/root has the real one."""

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loopd.cli import agent
from tests.harness.asynchronous import run_async


class Started(list[list[str]]):
    """The commands that were started, each of which ends at once."""

    def start(self, command: list[str], **_: Any) -> "Started":
        self.append(command)
        return self

    def terminate(self) -> None:
        """Nothing is left to end."""

    def wait(self, timeout: float) -> int:
        """It has ended."""
        return 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """For somebody at a terminal, who is not root, in no session."""
    made = Started()
    monkeypatch.setattr(subprocess, "Popen", made.start)
    monkeypatch.setattr(agent, "_somebody_types", lambda: True)
    monkeypatch.setattr(agent, "_terminal_restored", contextlib.nullcontext)
    monkeypatch.setattr(agent, "_USERS", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return made


def use(*, wanted: bool = True) -> None:
    async def within() -> None:
        async with agent.agent(wanted=wanted):
            pass

    run_async(within())


def test_the_agent_is_for_this_process(started: Started) -> None:
    use()
    (command,) = started
    assert "pkttyagent" in command
    assert f"--process={os.getpid()}" in command
    assert "--fallback" not in command


def test_in_a_session_its_own_agent_comes_first(started: Started, tmp_path: Path) -> None:
    (tmp_path / str(os.getuid())).touch()
    use()
    assert "--fallback" in started[0]


def test_there_is_none_for_root_nor_where_nobody_types_nor_unwanted(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(wanted=False)
    monkeypatch.setattr(agent, "_somebody_types", lambda: False)
    use()
    monkeypatch.setattr(agent, "_somebody_types", lambda: True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    use()
    assert started == []


def test_a_system_without_an_agent_does_without(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "Popen", missing)
    use()
