# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `loopd`: arguments, settings, and the exit status."""

import argparse
import asyncio
import logging
import os
import resource
import sys
from contextlib import ExitStack
from pathlib import Path

from loopd import __version__, notify
from loopd.daemon.devices.records import are_left
from loopd.daemon.host import journal, systemd
from loopd.errors import BusError, LoopError

from . import lifecycle
from .config import DEFAULT_PATH, Config, limited, load
from .threads import Threads

log = logging.getLogger(__name__)

# The device, its file and its lock; what calls under way carry, and what is being closed.
_FDS_PER_DEVICE = 3
_OTHER_FDS = 512
# How many mistakes in the settings the manager's property tells; the log has all.
_TOLD = 3


def main() -> None:
    """The command `loopd`; returns only by ending the process."""
    arguments = _parser().parse_args()
    config, mistakes = load(arguments.config)
    error = "; ".join(mistakes[:_TOLD])
    if arguments.check_config:
        sys.exit(_told(mistakes))
    if mistakes and not _has_left(arguments.runtime_directory):
        # What systemd knows of a unit that has failed it tells to everybody, as loopctl does.
        notify.tell(f"STATUS={error}")
        # The unit says that starting anew is of no use then.
        sys.exit(_told(mistakes))
    journal.start(debug=arguments.debug)
    for mistake in mistakes:
        log.error("%s: the default holds, so that no device is lost", mistake)
    try:
        config = _fit(config)
        threads = Threads()
        # Not closed: what is in it is ours to the very end, also of threads that detach.
        ours = ExitStack()
        status = asyncio.run(
            lifecycle.run(config, error, arguments.runtime_directory, threads, ours)
        )
    except (BusError, LoopError) as exc:
        notify.tell(f"STATUS={exc}")
        sys.exit(f"loopd: {exc}")
    except OSError as exc:
        notify.tell(f"STATUS={exc}")
        sys.exit(f"loopd: cannot start: {exc}")
    if hanging := threads.stop(lifecycle.STOP_TIMEOUT):
        # A thread that a hanging file holds would keep the interpreter from ending, too.
        log.warning(
            "leaving with %d calls under way on files or devices that hang: the kernel may keep "
            "this process until their servers answer or are aborted",
            hanging,
        )
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _told(mistakes: list[str]) -> int:
    """Tell the mistakes in the settings; returns the exit status."""
    for mistake in mistakes:
        print(f"loopd: {mistake}", file=sys.stderr)
    return os.EX_CONFIG if mistakes else os.EX_OK


def _has_left(runtime_directory: Path) -> bool:
    """Whether there are devices of a former loopd, which would be lost without another one."""
    return systemd.passes_fds() or are_left(runtime_directory)


def _fit(config: Config) -> Config:
    """Take as many open files as the system gives, and what they are enough for."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    return limited(config, files - _OTHER_FDS, _FDS_PER_DEVICE, f"{files} open files are")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loopd", description="Give programs loop devices, over D-Bus, as org.example.Loop1."
    )
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--runtime-directory",
        type=Path,
        default=Path("/run/loopd"),
        metavar="DIR",
        help="where udev's rules look for the marks (default: %(default)s)",
    )
    parser.add_argument(
        "--check-config", action="store_true", help="tell the mistakes in the settings, and end"
    )
    parser.add_argument("--debug", action="store_true", help="log every step")
    parser.add_argument("--version", action="version", version=f"loopd {__version__}")
    return parser
