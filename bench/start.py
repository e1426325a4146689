# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.start`: from a call that makes the bus start loopd to its answer.

As it is installed: compiled, and with Debian's Python. Beside it `python3 -c 'import asyncio'`.
Under the unit's sandbox on machines that systemd-nspawn boots, one for each release of Debian, with
the package of this checkout.
"""

import compileall
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import rig
from bench.results import Result, Target, alone, median, percentile
from tests.harness import package, roots
from tests.harness.area import CHECKOUT, area
from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.caller import MANAGER, MANAGER_PATH
from tests.harness.daemon import LIBRARIES

STARTS = 25
ASYNCIO = "python3 -c 'import asyncio'"
IN_MACHINE = Path(__file__).with_name("unit_program.py")
PROGRAM = """#!{python} -I
import sys
sys.path.insert(0, "{directory}")
{library}
sys.argv[1:] = ["--config", "{directory}/loopd.toml", "--runtime-directory", "{directory}/run"]
from loopd.__main__ import main
sys.exit(main())
"""
SERVICE = f"""[D-BUS Service]
Name={LOOPD}
Exec={{directory}}/program
"""


def measure() -> Result:
    """Start each in turns, and then on the machines."""
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        starts: dict[str, Callable[[], float]] = {ASYNCIO: bare}
        for library in LIBRARIES:
            bus = stack.enter_context(activating(library))
            starts[f"loopd, {library}"] = lambda bus=bus: activated(bus)
        for count in range(STARTS + 1):
            for name, start in starts.items():
                taken = start()
                if count:  # the first one reads from disk
                    times.setdefault(name, []).append(taken)
    limits = dict.fromkeys(times.keys() - {ASYNCIO}, 150)
    notes = []
    for release in roots.RELEASES.values():
        where = f"in {release.name}, systemd {release.systemd}"
        try:
            pairs = in_machine(release)
        except (roots.CannotMakeError, FileNotFoundError) as exc:
            notes.append(f"Not measured {where}: {exc}")
            continue
        unit = f"loopd.service {where}"
        times[unit], times[f"{ASYNCIO} {where}"] = map(list, zip(*pairs, strict=True))
        limits[unit] = 250
    result = Result(
        title="Cold start by activation, from the call to the answer, ms",
        columns=["median", "p90"],
        notes=notes,
    )
    for name, found in times.items():
        measured = percentile(found, 90)
        result.rows[name] = [median(found), measured]
        if limit := limits.get(name):
            what = f"{name}: 90th percentile"
            result.targets.append(Target(what=what, measured=measured, limit=limit, unit=" ms"))
    return result


def bare() -> float:
    """Python itself, with what loopd needs at least."""
    begun = time.perf_counter()
    subprocess.run([rig.PYTHON, "-I", "-c", "import asyncio"], check=True)
    return time.perf_counter() - begun


@contextmanager
def activating(library: str) -> Iterator[PrivateBus]:
    """A bus that starts loopd."""
    with area("start") as directory:
        shutil.copytree(CHECKOUT / "loopd", directory / "loopd")
        shutil.copy(CHECKOUT / "dbus" / f"{LOOPD}.xml", directory / "loopd")
        compileall.compile_dir(directory / "loopd", quiet=1)
        (directory / "loopd.toml").touch()
        wanted = importlib.util.find_spec(library)
        assert wanted, f"{library} is not installed"
        # That of the package index is not where Debian's Python looks.
        (directory / library).symlink_to(Path(wanted.origin or "").parent)
        hidden = [each for each in LIBRARIES if each != library]
        program = directory / "program"
        program.write_text(
            PROGRAM.format(
                python=rig.PYTHON,
                directory=directory,
                library="\n".join(f"sys.modules[{each!r}] = None" for each in hidden),
            )
        )
        program.chmod(0o755)
        (directory / f"{LOOPD}.service").write_text(SERVICE.format(directory=directory))
        with PrivateBus(servicedirs=[directory]) as bus:
            yield bus


def activated(bus: PrivateBus) -> float:
    """Have it started, and ended."""
    with bus.connect() as client:
        begun = time.perf_counter()
        client.call(MANAGER_PATH, MANAGER, "ListDevices")
        taken = time.perf_counter() - begun
        (pid,) = client.call_bus("GetConnectionUnixProcessID", "s", [LOOPD])
    os.kill(pid, signal.SIGTERM)
    bus.wait_released(LOOPD)
    while os.path.exists(f"/proc/{pid}/exe"):  # the next one would wait for its end
        time.sleep(0.001)
    return taken


def in_machine(release: roots.Release) -> list[tuple[float, float]]:
    """The seconds of calls that have the unit started, and of Python itself there."""
    with area("start") as directory:
        built = package.build(directory)
        with package.machine_with(release, roots.make(release), built) as machine:
            told = machine.run("python3", "-I", "-c", IN_MACHINE.read_text(), str(STARTS))
    return [(start, python) for start, python in json.loads(told)]


if __name__ == "__main__":
    alone(measure)
