# SPDX-License-Identifier: LGPL-2.1-or-later
"""The authority on a private bus: the real polkitd, or a double that does as it is told.

RealPolkit sees our policy file, the rules and the sessions it is given, and nothing of the host's;
the host sees nothing of it.  PolkitDouble answers from a thread of the test, as programmed, and
writes down every question and every cancellation.
"""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness import wire
from tests.harness.area import CHECKOUT, area
from tests.harness.bus import POLKIT, PrivateBus
from tests.harness.deadline import DEFAULT_TIMEOUT, Deadline
from tests.harness.process import Process
from tests.harness.raw import BUS, DisconnectedError, RawClient

POLKITD = Path("/usr/lib/polkit-1/polkitd")
OUR_ACTIONS = CHECKOUT / "polkit" / "org.example.loop1.policy"
STOCK_ACTIONS = Path("/usr/share/polkit-1/actions/org.freedesktop.policykit.policy")
UDISKS_ACTIONS = Path("/usr/share/polkit-1/actions/org.freedesktop.UDisks2.policy")

RULES_DENY_ALL = "polkit.addRule(function(action, subject) { return polkit.Result.NO; });\n"
RULES_ALLOW_ALL = "polkit.addRule(function(action, subject) { return polkit.Result.YES; });\n"
RULES_NONE = ""
"""The defaults of the policy file decide: without a login session that means auth_admin."""


def rules_allowing(*actions: str, users: tuple[str, ...] = ()) -> str:
    """Return rules that say yes to these actions (for these users only), and nothing to others."""
    who = " || ".join(f'subject.user == "{user}"' for user in users) or "true"
    what = " || ".join(f'action.id == "{action}"' for action in actions) or "false"
    return (
        "polkit.addRule(function(action, subject) {\n"
        f"    if (({what}) && ({who})) return polkit.Result.YES;\n"
        "});\n"
    )


class RealPolkit:
    """The system's polkitd on a private bus, ready when the `with` block is entered."""

    def __init__(self, bus: PrivateBus, rules: str = RULES_NONE) -> None:
        """Prepare a polkitd with `rules`, in polkit's JavaScript, as its only rules."""
        self._bus = bus
        self._rules = rules
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = stack.enter_context(area("polkit"))
            actions, rules, none = (directory / each for each in ("actions", "rules", "none"))
            for each in (actions, rules, none):
                each.mkdir()
            for policy in (OUR_ACTIONS, STOCK_ACTIONS, UDISKS_ACTIONS):
                if policy.exists():
                    shutil.copyfile(policy, actions / policy.name)
            (rules / "50-test.rules").write_text(self._rules)
            self._logind = directory / "systemd"
            for kind in ("machines", "seats", "sessions", "users"):
                (self._logind / kind).mkdir(parents=True)
            self.process = stack.enter_context(
                Process(
                    [
                        *("unshare", "--mount", "--propagation", "private", "--"),
                        *("sh", "-euc", _mount_and_run(directory)),
                    ],
                    name="polkitd",
                    environment={"DBUS_SYSTEM_BUS_ADDRESS": self._bus.address},
                )
            )
            self._bus.wait_owned(POLKIT, process=self.process)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    @property
    def pid(self) -> int:
        """The process id of polkitd."""
        return self.process.pid

    def log_in(self, process: Process) -> None:
        """Have a process be of a local session of its user's, who is active from now on.

        polkitd alone sees it so: it finds a session by the cgroup, and reads of it and of the user
        what logind has written.
        """
        session = f"c{process.pid}"
        uid = os.stat(f"/proc/{process.pid}").st_uid
        (self._logind / "sessions" / session).write_text(
            f"UID={uid}\nREMOTE=0\nTYPE=tty\nCLASS=user\nSEAT=seat0\n"
        )
        self.set_active(uid, active=True)
        scope = f"/user.slice/user-{uid}.slice/session-{session}.scope"
        cgroup = self._logind / f"{session}.cgroup"
        cgroup.write_text(f"1:name=systemd:{scope}\n0::{scope}\n")
        enter = ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt"]
        mount = ["mount", "--bind", cgroup, f"/proc/{process.pid}/cgroup"]
        subprocess.run([*enter, *mount], check=True, timeout=60)

    def set_active(self, uid: int, *, active: bool) -> None:
        """Say whether a user sits in front of one of those sessions."""
        state = "active" if active else "online"
        (self._logind / "users" / str(uid)).write_text(f"STATE={state}\n")

    def stop(self) -> None:
        """End polkitd; its name leaves the bus."""
        self.process.stop()


def _mount_and_run(directory: Path) -> str:
    """Return the script that hides the host's files behind ours and becomes polkitd."""
    covers = {
        "/usr/share/polkit-1/actions": "actions",
        "/etc/polkit-1/rules.d": "rules",
        "/usr/share/polkit-1/rules.d": "none",
        # Newer polkits also look here.
        "/run/polkit-1/rules.d": "none",
        "/usr/local/share/polkit-1/rules.d": "none",
        "/usr/local/share/polkit-1/actions": "none",
        "/run/systemd": "systemd",
    }
    mounts = [
        f"mount --bind '{directory / source}' '{target}'"
        for target, source in covers.items()
        if os.path.isdir(target) or source == "systemd"
    ]
    # Which systemd has made everywhere but on the barest of systems.
    return "\n".join(["mkdir -p /run/systemd", *mounts, f"exec {POLKITD} --no-debug"])


class Answer(Enum):
    """What the double does with a question."""

    ALLOW = "authorized"
    DENY = "not authorized"
    CHALLENGE = "not authorized, but the user could be asked"
    ERROR = "org.freedesktop.PolicyKit1.Error.Failed"
    HANG = "no answer until release() or a cancellation"
    ASK = "as HANG where somebody may be asked, else as CHALLENGE"
    DIE = "the authority leaves the bus without an answer"


@dataclass(kw_only=True)
class Question:
    """One CheckAuthorization as it came."""

    subject_kind: str
    subject: dict[str, Any]
    action: str
    details: dict[str, str]
    flags: int
    cancellation_id: str
    asker: str
    serial: int = field(repr=False)
    answered: bool = False

    @property
    def interactive(self) -> bool:
        """Whether polkit may prompt the user."""
        return bool(self.flags & 1)

    @property
    def bus_name(self) -> str | None:
        """The subject's unique name."""
        return self.subject.get("name")


class PolkitDouble:
    """An authority that answers as it is told; `default` holds for actions not programmed.

    It fails the test if the subject of any question is not a bus name.
    """

    def __init__(self, bus: PrivateBus, default: Answer = Answer.DENY) -> None:
        """Prepare a double; it owns polkit's name from the start of the `with` block."""
        self._bus = bus
        self._answers: dict[str, Answer] = {}
        self._changed = threading.Condition(threading.RLock())
        self._client: RawClient | None = None
        self._thread: threading.Thread | None = None
        self._wake = (-1, -1)
        self._failure: BaseException | None = None
        self.default = default
        self.questions: list[Question] = []
        """Every question so far, in the order in which they came."""
        self.cancelled: list[str] = []
        """The cancellation id of every CancelCheckAuthorization so far."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Take the name on the bus; also again, after stop() or an Answer.DIE."""
        self.stop()
        self._client = self._bus.connect()
        (result,) = self._client.call_bus("RequestName", "su", [POLKIT, 4])
        if result != 1:
            self._client.close()
            raise RuntimeError(f"{POLKIT} is taken on this bus")
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._serve, name="polkit double")
        self._thread.start()

    def stop(self) -> None:
        """Leave the bus, with every open question unanswered."""
        if self._thread is None:
            return
        os.write(self._wake[1], b"x")
        self._thread.join()
        self._thread = None
        for fd in self._wake:
            os.close(fd)
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def on(self, action: str, answer: Answer) -> None:
        """Answer questions about `action` so from now on."""
        with self._changed:
            self._answers[action] = answer

    def reset(self, default: Answer) -> None:
        """Forget what was programmed and what was asked; answer everything by `default`."""
        with self._changed:
            self.default = default
            self._answers.clear()
            self.questions.clear()
            self.cancelled.clear()

    def release(self, answer: Answer = Answer.ALLOW, question: Question | None = None) -> None:
        """Answer the hanging `question`, or all that hang, at last."""
        with self._changed:
            for each in [question] if question else self.open_questions():
                self._give(each, answer)

    def open_questions(self) -> list[Question]:
        """Return the questions that have no answer yet."""
        with self._changed:
            return [each for each in self.questions if not each.answered]

    def wait_question(
        self, action: str | None = None, *, count: int = 1, timeout: float | None = None
    ) -> Question:
        """Wait until `count` questions (about `action`) have come in all; return the last one."""

        def asked() -> list[Question]:
            return [each for each in self.questions if action in (None, each.action)]

        self._wait(lambda: len(asked()) >= count, f"question {count} about {action}", timeout)
        return asked()[count - 1]

    def wait_cancelled(self, question: Question, timeout: float | None = None) -> None:
        """Wait until the asker has cancelled `question`."""
        self._wait(
            lambda: question.cancellation_id in self.cancelled, f"the end of {question}", timeout
        )

    def _wait(self, true: Callable[[], bool], what: str, timeout: float | None) -> None:
        with self._changed:
            limit = DEFAULT_TIMEOUT if timeout is None else timeout
            if not self._changed.wait_for(lambda: true() or self._failure is not None, limit):
                raise TimeoutError(f"{what}: not within {limit:g} s")
            if self._failure is not None:
                raise RuntimeError("the polkit double failed") from self._failure

    def _serve(self) -> None:
        assert self._client is not None
        try:
            while True:
                for message in self._client.drain():
                    if message.type == wire.METHOD_CALL:
                        self._handle(message)
                ready = _wait_for_ever([self._client.fileno(), self._wake[0]])
                if self._wake[0] in ready:
                    return
                self._client.received.append(self._client.receive())
        except DisconnectedError:
            pass  # by Answer.DIE, or the bus has gone
        except Exception as exc:  # noqa: BLE001 - raised again by stop() and the waits
            with self._changed:
                self._failure = exc
                self._changed.notify_all()

    def _handle(self, message: wire.Message) -> None:
        with self._changed:
            if message.member == "CheckAuthorization":
                (kind, subject), action, details, flags, cancellation_id = message.body
                if kind != "system-bus-name" or subject.keys() != {"name"}:
                    # A pid or a uid would be a claim, and may be another's by now.
                    raise ValueError(f"asked about {kind} {subject}, and not about a bus name")
                question = Question(
                    subject_kind=kind,
                    subject=wire.plain(subject),
                    action=action,
                    details=details,
                    flags=flags,
                    cancellation_id=cancellation_id,
                    asker=str(message.sender),
                    serial=message.serial,
                )
                self.questions.append(question)
                self._give(question, self._answers.get(action, self.default))
            elif message.member == "CancelCheckAuthorization":
                (cancellation_id,) = message.body
                self.cancelled.append(cancellation_id)
                self._reply(str(message.sender), message.serial)
                for question in self.open_questions():
                    if question.cancellation_id == cancellation_id:
                        question.answered = True
                        self._error(question, f"{POLKIT}.Error.Cancelled", "cancelled")
            else:
                self._send_error(
                    str(message.sender),
                    message.serial,
                    f"{BUS}.Error.UnknownMethod",
                    f"the double has no {message.member}",
                )
            self._changed.notify_all()

    def _give(self, question: Question, answer: Answer) -> None:
        if answer is Answer.ASK:
            answer = Answer.HANG if question.interactive else Answer.CHALLENGE
        if answer is Answer.HANG:
            return
        question.answered = True
        if answer is Answer.DIE:
            assert self._client is not None
            self._client.close()
            self._changed.notify_all()
            raise DisconnectedError
        if answer is Answer.ERROR:
            self._error(question, f"{POLKIT}.Error.Failed", "the double was told to fail")
            return
        body: list[Any] = [(answer is Answer.ALLOW, answer is Answer.CHALLENGE, {})]
        self._reply(question.asker, question.serial, "(bba{ss})", body)

    def _error(self, question: Question, name: str, text: str) -> None:
        self._send_error(question.asker, question.serial, name, text)

    def _send_error(self, asker: str, serial: int, name: str, text: str) -> None:
        self._answer(asker, serial, type=wire.ERROR, error_name=name, signature="s", args=[text])

    def _reply(
        self, asker: str, serial: int, signature: str = "", args: list[Any] | None = None
    ) -> None:
        self._answer(asker, serial, type=wire.METHOD_RETURN, signature=signature, args=args or [])

    def _answer(self, asker: str, serial: int, **message: Any) -> None:
        assert self._client is not None
        self._client.send(
            None, None, None, destination=asker, reply_serial=serial, flags=1, **message
        )


def _wait_for_ever(fds: list[int]) -> set[int]:
    return Deadline(24 * 3600).wait_readable(fds, "a question")
