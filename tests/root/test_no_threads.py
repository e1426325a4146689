# SPDX-License-Identifier: LGPL-2.1-or-later
"""No thread can be started for what a client asks: it is told so, and nothing stays open."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.caller import Caller
from tests.harness.deadline import Deadline
from tests.harness.service import Service, service
from tests.harness.wire import CallError

NO_THREADS = """
from pathlib import Path
from loopd import errors; from loopd.daemon import threads

def _submit(self, pool, function, *, gives_up=False, _is=threads.Threads._submit):
    if gives_up and Path({flag!r}).exists() and {which!r} in str(function):
        raise errors.LimitsExceeded("no thread")
    return _is(self, pool, function, gives_up=gives_up)

threads.Threads._submit = _submit
"""
"""While a file is there, and for functions of this name."""


@pytest.fixture
def unit() -> Iterator[Service]:
    with service() as made:
        yield made


def begin(unit: Service, which: str) -> tuple[Caller, Path]:
    flag = unit.new_path()
    unit.prelude = NO_THREADS.format(flag=str(flag), which=which)
    unit.start()
    return unit.caller(), flag


def wait_fds(unit: Service, count: int) -> None:
    """Wait until loopd has no more fds than that."""
    deadline = Deadline()
    with unit.bus.connect("nobody") as client:
        while len(os.listdir(f"/proc/{unit.daemon.process.pid}/fd")) > count:
            assert deadline.remaining
            unit.devices(client)


def test_an_operation_keeps_no_device(unit: Service) -> None:
    caller, flag = begin(unit, "operate")
    attached = caller.attach(unit.image())
    flag.touch()
    with pytest.raises(CallError, match="LimitsExceeded"):
        caller.device(attached.path, "SetReference", "sa{sv}", "name", {})
    assert caller.detach(attached.path) is True


def test_a_device_that_was_to_stay_goes(unit: Service) -> None:
    caller, flag = begin(unit, "keep")
    flag.touch()
    with pytest.raises(CallError, match="LimitsExceeded"):
        caller.attach(unit.image(), lifetime="system")
    unit.wait_nothing()


@pytest.mark.parametrize(("which", "method"), [("_attach", "Attach"), ("named_by", "Detach")])
def test_a_passed_file_is_closed(unit: Service, which: str, method: str) -> None:
    caller, flag = begin(unit, which)
    caller.detach(caller.attach(unit.image()).path)
    with unit.bus.connect("nobody") as client:
        unit.wait_right(client)
    before = len(os.listdir(f"/proc/{unit.daemon.process.pid}/fd"))
    flag.touch()
    with unit.image().open("r+b") as file:
        for _ in range(5):
            with pytest.raises(CallError, match="LimitsExceeded"):
                caller.manager(method, "ha{sv}", 0, {}, fds=[file.fileno()])
    wait_fds(unit, before)
