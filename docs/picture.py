# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make picture`: docs/loopctl.svg, of commands that are run for it, on real loop devices.

As in the tests of the documents, with a terminal.
"""

import io
import os
import pwd
import re
import shlex
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from rich.console import Console  # noqa: E402
from rich.terminal_theme import DIMMED_MONOKAI  # noqa: E402
from rich.text import Text  # noqa: E402

from tests.harness.area import area  # noqa: E402
from tests.harness.documents import Session, session  # noqa: E402
from tests.harness.images import MIB, make_ext4  # noqa: E402
from tests.harness.logind import LogindDouble  # noqa: E402
from tests.harness.polkit import RULES_ALLOW_ALL  # noqa: E402
from tests.harness.world import USER, make_world  # noqa: E402

PICTURE = CHECKOUT / "docs" / "loopctl.svg"
WIDTH = 86
COMMANDS = """
loopctl attach holiday.img
sudo mount -o nosuid,nodev /dev/loop0 /mnt; ls /mnt
loopctl list -j holiday.img -O NAME,SIZE,OWNER,LIFETIME,BACK-FILE
sudo umount /mnt; loopctl detach holiday.img
# For as long as a command runs:
loopctl run holiday.img -- lsblk --nodeps {}
# And if it is loopctl that is killed:
loopctl run holiday.img -- sh -c 'kill -9 $PPID'
loopctl list -j holiday.img
"""


def main() -> int:
    """Run the commands and draw them; the exit status."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor")
    with area("picture") as directory, make_world(authority=RULES_ALLOW_ALL) as world:
        os.chown(directory, pwd.getpwnam(USER).pw_uid, -1)
        make_ext4(directory / "holiday.img", 16 * MIB, owner=USER)
        variables = {"DBUS_SYSTEM_BUS_ADDRESS": world.bus.address, "TERM": "xterm-256color"}
        with (
            LogindDouble(world.bus, pwd.getpwnam(USER).pw_uid),
            session(USER, directory, variables) as shell,
        ):
            node = "/dev/loop0"
            for line in COMMANDS.strip().splitlines():
                command = line.replace("/dev/loop0", node)
                style = "bright_black" if command[0] == "#" else ""
                console.print(Text.assemble(("$ ", "bold green"), (command, style)))
                if command[0] != "#" and (text := printed(shell, command, directory)):
                    console.print(Text.from_ansi(text))
                    # Whichever was free.
                    node = re.findall(r"/dev/loop\d+", text)[0] if "attach" in line else node
    svg = console.export_svg(title="loopctl", theme=DIMMED_MONOKAI)
    # The fonts that it would fetch from elsewhere.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    licence = "<!-- SPDX-License-Identifier: LGPL-2.1-or-later -->"
    PICTURE.write_text(f"{licence}\n{svg}\n")
    return 0


def printed(shell: Session, command: str, directory: Path) -> str:
    """What a command prints on a terminal."""
    there = f"stty cols {WIDTH} rows 24; {command}"
    _, text = shell.enter(
        f"script --quiet --return --command {shlex.quote(there)} /dev/null </dev/null"
    )
    return text.replace("\r\n", "\n").replace(f"{directory}/", "~/").rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
