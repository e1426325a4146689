# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.floor`: what nobody can do without who serves callers on a bus and asks polkit.

Each step by itself, so that it can be subtracted: a call that does nothing, polkit's answer, what
loopd does to the kernel. One at a time for the latency, and by sixteen programs for the rate.
"""

import asyncio
import time
from collections.abc import Iterator

from bench import raw, rig
from bench.pairs import library_pair, losetup_pair
from bench.results import Result, alone, median, percentile
from loopd.daemon.threads import Threads
from tests.harness import wire
from tests.harness.bus import POLKIT
from tests.harness.caller import MANAGER_PATH
from tests.harness.daemon import LIBRARIES
from tests.harness.raw import BUS, BUS_PATH, RawClient

ROUNDS = 5
CALLS = 40
CLIENTS = 16
MANY = 1000
RAW, LIBRARY, LOSETUP = "raw ioctls, a pair", "loopd.loop, a pair", "losetup, a pair"
CALL, QUESTION = "the bus, a call", "polkit, a question"
HANDOVER = "a thread, there and back"
HANDOVERS = 4
"""Of a pair, as bench.steps counts them."""
_REST = 0.002
PEER = "org.freedesktop.DBus.Peer"
AUTHORITY = "org.freedesktop.PolicyKit1.Authority"
AUTHORITY_PATH = "/org/freedesktop/PolicyKit1/Authority"


def measure() -> Result:
    """Each in turns."""
    times: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    with rig.image() as image:
        for _ in range(ROUNDS):
            times.setdefault(RAW, []).extend(sum(raw.pair(image)) for _ in range(CALLS))
            times.setdefault(LIBRARY, []).extend(sum(library_pair(image)) for _ in range(CALLS))
            times.setdefault(LOSETUP, []).extend(sum(losetup_pair(image)) for _ in range(CALLS))
            times.setdefault(HANDOVER, []).extend(asyncio.run(hand_over()))
            for library in LIBRARIES:
                with rig.running(library, rig.ROOM) as (bus, _):
                    with rig.clients(bus, CLIENTS) as clients, bus.connect(rig.USER) as subject:
                        for name, send in steps(library, subject):
                            times.setdefault(name, []).extend(one_by_one(clients[0], send))
                            rates.setdefault(name, []).append(rate(clients, send))
    result = Result(
        title="By itself, ms; and how many a second for sixteen programs",
        columns=["median", "p99", "a second"],
    )
    for name, found in times.items():
        many = median(rates[name]) / 1000 if name in rates else None
        result.rows[name] = [median(found), percentile(found, 99), many]
    result.notes = list(sums({name: median(found) for name, found in times.items()}))
    return result


def sums(medians: dict[str, float]) -> Iterator[str]:
    """What a pair cannot cost less than, by these medians."""
    for library in LIBRARIES:
        calls = 2 * medians[idle(library)] + HANDOVERS * medians[HANDOVER]
        root = calls + medians[LIBRARY]
        user = root + medians[QUESTION]
        yield (
            f"{library}: two calls, {HANDOVERS} times a thread and {LIBRARY} are {root:.2f} ms, "
            f"which is raw + {root - medians[RAW]:.2f} ms; with a question to polkit it is "
            f"{user:.2f} ms, {user / medians[LOSETUP]:.2f} of losetup's pair"
        )
    least = 2 * medians[CALL] + medians[QUESTION] + medians[RAW]
    yield (
        f"two calls that only the bus answers, a question to polkit and raw ioctls are {least:.2f} "
        f"ms, {least / medians[LOSETUP]:.2f} of losetup's pair"
    )


async def hand_over() -> list[float]:
    """The seconds until a thread has done nothing, each time after a rest as between calls."""
    threads = Threads()
    times = []
    for _ in range(CALLS):
        await asyncio.sleep(_REST)
        begun = time.perf_counter()
        await threads.run(lambda: None)
        times.append(time.perf_counter() - begun)
    threads.stop(1)
    return times


def idle(library: str) -> str:
    """What a call to loopd by itself is called."""
    return f"loopd, {library}, a call that does nothing"


def steps(library: str, subject: RawClient) -> list[tuple[str, rig.Send]]:
    """What a call consists of at least."""
    question = [
        ("system-bus-name", {"name": wire.Variant("s", subject.unique_name)}),
        rig.ATTACH,
        {"lifetime": "connection"},
        0,
        "",
    ]

    def ask_the_bus(client: RawClient) -> None:
        client.send(BUS_PATH, BUS, "GetId", destination=BUS)

    def ask_loopd(client: RawClient) -> None:
        client.send(MANAGER_PATH, PEER, "Ping")

    def ask_polkit(client: RawClient) -> None:
        member, signature = "CheckAuthorization", "(sa{sv})sa{ss}us"
        client.send(AUTHORITY_PATH, AUTHORITY, member, signature, question, destination=POLKIT)

    return [
        (CALL, ask_the_bus),
        (idle(library), ask_loopd),
        (QUESTION, ask_polkit),
    ]


def one_by_one(client: RawClient, send: rig.Send) -> list[float]:
    """The seconds until each is answered."""
    times = []
    for _ in range(CALLS):
        begun = time.perf_counter()
        rig.call_many([client], send, 1)
        times.append(time.perf_counter() - begun)
    return times


def rate(clients: list[RawClient], send: rig.Send) -> float:
    """How many are answered in a second."""
    begun = time.perf_counter()
    rig.call_many(clients, send, MANY)
    return MANY / (time.perf_counter() - begun)


if __name__ == "__main__":
    alone(measure)
