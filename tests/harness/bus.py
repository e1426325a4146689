# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private system bus: a real dbus-daemon under the stock default policy and limits.

Our own policy file and Debian's for polkit are included as they would be on a system, so every
test goes through them.  Root may also own the names of polkit, logind and systemd, for doubles.
Any uid may connect.  Nothing is activated but what stands in the given service directories, which
are run directly, as the bus's own user.
"""

import os
import shutil
import xml.sax.saxutils
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.area import CHECKOUT, area
from tests.harness.deadline import Deadline
from tests.harness.process import Process
from tests.harness.raw import BUS, RawClient

LOOPD = "org.example.Loop1"
QUESTIONS = f"{LOOPD}.Questions"
"""The name of the connection on which loopd asks others."""
POLKIT = "org.freedesktop.PolicyKit1"
LOGIND = "org.freedesktop.login1"
SYSTEMD = "org.freedesktop.systemd1"

OUR_POLICY = CHECKOUT / "dbus" / f"{LOOPD}.conf"
POLKIT_POLICY = Path(f"/usr/share/dbus-1/system.d/{POLKIT}.conf")

_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <auth>EXTERNAL</auth>
  <listen>unix:path={socket}</listen>
{servicedirs}
  <!-- What follows, up to the doubles, is the stock system.conf. -->
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.DBus"
           send_interface="org.freedesktop.DBus.Introspectable"/>
    <allow send_destination="org.freedesktop.DBus"
           send_interface="org.freedesktop.DBus.Properties"/>
    <deny send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"
          send_member="UpdateActivationEnvironment"/>
    <deny send_destination="org.freedesktop.DBus"
          send_interface="org.freedesktop.DBus.Debug.Stats"/>
    <deny send_destination="org.freedesktop.DBus"
          send_interface="org.freedesktop.systemd1.Activator"/>
  </policy>
  <policy user="root">
    <allow send_destination="org.freedesktop.DBus"
           send_interface="org.freedesktop.systemd1.Activator"/>
    <allow send_destination="org.freedesktop.DBus"
           send_interface="org.freedesktop.DBus.Monitoring"/>
    <allow send_destination="org.freedesktop.DBus"
           send_interface="org.freedesktop.DBus.Debug.Stats"/>
  </policy>
{limits}
{includes}
  <!-- The doubles of polkit, logind and systemd run as whoever runs the tests. -->
  <policy user="{tester}">
    <allow own="org.freedesktop.PolicyKit1"/>
    <allow own="org.freedesktop.login1"/>
    <allow own="org.freedesktop.systemd1"/>
    {tester_owns}
  </policy>
  <policy context="default">
    <allow send_destination="org.freedesktop.PolicyKit1"/>
    <allow send_destination="org.freedesktop.login1"/>
    <allow send_destination="org.freedesktop.systemd1"/>
  </policy>
</busconfig>
"""


class PrivateBus:
    """A dbus-daemon of one's own, ready when the `with` block is entered."""

    def __init__(
        self,
        *,
        policies: Sequence[Path] | None = None,
        limits: Mapping[str, int] | None = None,
        servicedirs: Sequence[Path] = (),
        accounts: Sequence[int] = (),
    ) -> None:
        """Prepare a bus.

        `policies` are the files included after the default policy (ours and polkit's when None;
        those that are not there are passed over); `limits` are dbus-daemon's, by name; `accounts`
        are uids that have an account as far as the bus sees (without one it lets nobody in).
        """
        given = (OUR_POLICY, POLKIT_POLICY) if policies is None else policies
        self._policies = [path for path in given if path.exists()]
        self._limits = dict(limits or {})
        self._servicedirs = servicedirs
        self._accounts = accounts
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = stack.enter_context(area("bus"))
            self.socket_path = directory / "socket"
            config = directory / "bus.conf"
            config.write_text(self._config())
            self._passwd = directory / "passwd"
            self.process = stack.enter_context(self._start(config))
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
        """The process id of the dbus-daemon."""
        return self.process.pid

    def stop(self) -> None:
        """End the bus in good order; every connection to it closes."""
        self.process.stop()

    def kill(self) -> None:
        """End the bus by SIGKILL."""
        self.process.kill()

    def connect(self, user: str | int | None = None) -> RawClient:
        """Return a new connection, as `user` when one is named."""
        return RawClient(self.address, user=user)

    def wait_owned(
        self, name: str, *, process: Process | None = None, timeout: float | None = None
    ) -> str:
        """Wait until someone owns `name`; return who.  The end of `process` ends the wait, too."""
        owner = self._wait_owner(name, wanted=True, process=process, timeout=timeout)
        return str(owner)

    def wait_released(
        self, name: str, *, process: Process | None = None, timeout: float | None = None
    ) -> None:
        """Wait until nobody owns `name`, which may be a connection's unique name."""
        self._wait_owner(name, wanted=False, process=process, timeout=timeout)

    def _wait_owner(
        self, name: str, *, wanted: bool, process: Process | None, timeout: float | None
    ) -> str | None:
        deadline = Deadline(timeout)
        with self.connect() as client:
            # The match comes first, so that no change falls between the look and the wait.
            client.add_match(
                f"type='signal',sender='{BUS}',interface='{BUS}',"
                f"member='NameOwnerChanged',arg0='{name}'"
            )
            what = f"{name} to be {'owned' if wanted else 'released'}"
            while ((owner := client.owner_of(name)) is not None) != wanted:
                if client.drain():
                    continue
                fds = [client.fileno()] + ([process.pidfd] if process else [])
                ready = deadline.wait_readable(fds, what)
                if process and process.pidfd in ready:
                    raise RuntimeError(
                        f"{process.name} ended ({process.wait()}) before {what}:\n"
                        + process.log.text
                    )
                client.receive(deadline.remaining)
            return owner

    def _start(self, config: Path) -> Process:
        read_end, write_end = os.pipe()
        try:
            # A test run that is killed takes its buses with it; the programs on them follow.
            process = Process(
                [
                    *(["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []),
                    *self._with_accounts(),
                    "dbus-daemon",
                    f"--config-file={config}",
                    "--nofork",
                    "--nopidfile",
                    "--nosyslog",
                    f"--print-address={write_end}",
                ],
                name="dbus-daemon",
                pass_fds=[write_end],
            )
            os.close(write_end)
            write_end = -1
            try:
                Deadline().wait_readable([read_end], "the address of the bus")
                self.address = os.read(read_end, 4096).decode().strip()
                if not self.address:
                    process.wait()
                    raise RuntimeError(f"dbus-daemon did not start:\n{process.log.text}")
            except BaseException:
                process.stop()
                raise
            return process
        finally:
            os.close(read_end)
            if write_end >= 0:
                os.close(write_end)

    def _with_accounts(self) -> list[str]:
        """Return what comes before a command that is to see the accounts."""
        if not self._accounts:
            return []
        own = [f"loopd-test-{uid}:x:{uid}:{uid}::/:/bin/false" for uid in self._accounts]
        self._passwd.write_text("\n".join([Path("/etc/passwd").read_text().rstrip("\n"), *own, ""]))
        script = f"mount --bind '{self._passwd}' /etc/passwd; exec \"$@\""
        mounts = ["unshare", "--mount", "--propagation", "private", "--"]
        return [*mounts, "sh", "-euc", script, "sh"]

    def _config(self) -> str:
        escape = xml.sax.saxutils.escape
        # Our policy gives the name to root alone, which the tests need not be.
        tester_owns = "" if os.getuid() == 0 else f'<allow own="{LOOPD}"/>'
        if OUR_POLICY not in self._policies:
            tester_owns = (
                f'<allow own="{LOOPD}"/></policy>'
                f'<policy context="default"><allow send_destination="{LOOPD}"/>'
            )
        return _CONFIG.format(
            socket=escape(str(self.socket_path)),
            servicedirs="".join(
                f"  <servicedir>{escape(str(path))}</servicedir>\n" for path in self._servicedirs
            ),
            limits="".join(
                f'  <limit name="{name}">{value}</limit>\n' for name, value in self._limits.items()
            ),
            includes="".join(
                f"  <include>{escape(str(path))}</include>\n" for path in self._policies
            ),
            tester=os.getuid(),
            tester_owns=tester_owns,
        )
