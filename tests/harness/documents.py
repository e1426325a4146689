# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the documents show: their fenced blocks, and sessions of a shell to run them in.

The words behind a block's fence say what becomes of it.  Each has to be one of KINDS, and nothing
that looks like a command stands outside of such a block.

    console                     run as an ordinary user, here; `sudo` makes it root
    console booted              run in a booted machine, by tests/machine
    console elsewhere=FILE::T   run by that test
    python, sh file=NAME        a program that a console block of the document runs
    python                      a program that gets an image as its argument
    js, toml, udev              a rule of polkit, settings, rules of udev
    ini, fstab file=PATH        files of the booted machine
    text                        nothing to be run
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness.area import CHECKOUT
from tests.harness.deadline import Deadline

DOCUMENTS = sorted(
    [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md"), *CHECKOUT.glob("examples/**/*.md")]
)
KINDS = (
    r"console( booted| elsewhere=tests/[\w/]+\.py::\w+)?"
    r"|(python|sh) file=[\w.-]+|python|js|toml|udev|(ini|fstab) file=\S+|text"
)

_FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LOOP = re.compile(r"\bloop(\d+)")
_END = "\x1e"


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(CHECKOUT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that it is."""
        return self.info.partition("file=")[2] or None

    def commands(self) -> list["Command"]:
        """What is entered at its prompts, with what is to come of it."""
        found: list[Command] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append(Command(line[2:]))
            elif line.startswith("> ") and found and not found[-1].output:
                found[-1].text += "\n" + line[2:]
            elif found:
                found[-1].output.append(line)
            else:
                raise AssertionError(f"{self}: no prompt before {line!r}")
        return found


@dataclass
class Command:
    """One command of a session, and the lines that it prints."""

    text: str
    output: list[str] = field(default_factory=list)


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document."""
    text = document.read_text()
    return [
        Block(document, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]


def name(document: Path) -> str:
    """Its path below the checkout."""
    return str(document.relative_to(CHECKOUT))


def outside(document: Path) -> str:
    """What is outside of them."""
    return _FENCE.sub("", document.read_text())


class Session:
    """A shell of a user in which the commands of a document are run, one after another."""

    def __init__(self, shell: "subprocess.Popen[bytes]") -> None:
        self._shell = shell
        self.pid = shell.pid
        self._loops: dict[str, str] = {}

    def run(self, command: Command) -> None:
        """Run one that has to succeed and to print what the document says.

        Of the document's names of loop devices each stands for one that there is: for which one,
        the last output that has it tells.
        """
        text = _LOOP.sub(lambda match: f"loop{self._loops.get(match[1], match[1])}", command.text)
        status, printed = self.enter(text)
        assert status == "0", f"{text}: {status}, {printed}"
        self._compare(text, command.output, printed)

    def enter(self, text: str) -> tuple[str, str]:
        """Run one, and return its exit status and what it printed."""
        stdin, stdout = self._shell.stdin, self._shell.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{text}\nprintf '{_END}%s{_END}' $?\n".encode())
        stdin.flush()
        deadline, data = Deadline(), b""
        while data.count(_END.encode()) < 2:
            deadline.wait_readable([stdout.fileno()], f"the end of {text!r} after {data!r}")
            read = os.read(stdout.fileno(), 1 << 16)
            assert read, f"the shell has ended: {data!r}"
            data += read
        printed, status, _ = data.decode(errors="replace").split(_END)
        return status, printed

    def _compare(self, text: str, expected: list[str], printed: str) -> None:
        names: list[str] = []
        patterns = []
        for line in expected:
            if line == "…":
                patterns.append(r"(?:.*\n)*?")
                continue
            pattern = ""
            for part in re.split(r"(\bloop\d+|…|\s+)", line.rstrip()):
                if match := _LOOP.fullmatch(part):
                    names.append(match[1])
                    pattern += r"loop(\d+)"
                else:
                    pattern += (
                        ".*" if part == "…" else r"\s+" if part.isspace() else re.escape(part)
                    )
            patterns.append(rf" *{pattern} *\n")
        if not expected:
            return
        match = re.fullmatch("".join(patterns), printed)
        assert match, f"{text} printed\n{printed}instead of\n" + "\n".join(expected)
        told = dict(zip(names, match.groups(), strict=True))
        assert [told[name] for name in names] == [*match.groups()]
        self._loops |= told


@contextmanager
def session(user: str, directory: Path, variables: Mapping[str, str]) -> Iterator[Session]:
    """Start a shell of a user's in a directory, with mounts and programs of its own.

    loopctl is this checkout's, and `sudo` asks nobody.
    """
    programs, package = directory / ".bin", directory / ".package"
    programs.mkdir()
    shutil.copytree(
        CHECKOUT / "loopd", package / "loopd", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(CHECKOUT / "dbus" / "org.example.Loop1.xml", package / "loopd")
    _program(
        programs / "loopctl",
        f"import sys\nsys.path.insert(0, {str(package)!r})\n"
        "from loopd.cli import main\nsys.exit(main())\n",
    )
    with ExitStack() as stack:
        path = directory / ".sudo"
        _program(programs / "sudo", _SUDO.format(path=str(path)))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()
        environment = {
            "PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(package),
            "HOME": str(directory),
            "LANG": "C.UTF-8",
            "USER": user,
            **variables,
        }
        command = [
            *("unshare", "--mount", "--propagation=private", "--"),
            *("setpriv", f"--reuid={user}", "--regid=nogroup", "--clear-groups"),
            *("bash", "--norc"),
        ]
        running = stack.enter_context(shell(command, cwd=directory, env=environment))
        server = threading.Thread(
            target=_serve_sudo, args=(listener, running.pid, environment), name="sudo"
        )
        server.start()
        # Whoever still waits for sudo is let go before the shell is waited for.
        stack.callback(server.join)
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        yield running


@contextmanager
def shell(command: list[str], **how: Any) -> Iterator[Session]:
    """Start a shell that reads commands; `how` goes to Popen."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **how,
    )
    # Its end of file is its end.
    with process:
        yield Session(process)


def _program(path: Path, text: str) -> None:
    python = getattr(sys, "_base_executable", sys.executable)
    path.write_text(f"#!{python} -I\n{text}")
    path.chmod(0o755)


_SUDO = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({path!r})
    request = json.dumps([os.getcwd(), sys.argv[1:]]).encode()
    socket.send_fds(server, [request], [0, 1, 2])
    sys.exit(int(server.recv(16)))
"""


def _serve_sudo(listener: socket.socket, shell: int, environment: dict[str, str]) -> None:
    """Run what is asked for as root, among the mounts of the shell, until the listener closes."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                request, fds, _, _ = socket.recv_fds(connection, 1 << 16, 3)
                directory, command = json.loads(request)
                done = subprocess.run(
                    ["nsenter", f"--mount=/proc/{shell}/ns/mnt", f"--wd={directory}", *command],
                    env=environment | {"USER": "root"},
                    stdin=fds[0],
                    stdout=fds[1],
                    stderr=fds[2],
                    check=False,
                )
                for fd in fds:
                    os.close(fd)
                connection.send(str(done.returncode).encode())
