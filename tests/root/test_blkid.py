# SPDX-License-Identifier: LGPL-2.1-or-later
"""What loopd(8) tells administrators who do not want udevd to look into users' images."""

import re
import subprocess

from tests.harness import loops
from tests.harness.area import CHECKOUT, area
from tests.harness.images import make_ext4
from tests.harness.udev import Udev


def test_the_rule_of_the_manual_page_keeps_udevd_from_looking() -> None:
    page = (CHECKOUT / "docs" / "man" / "loopd.8.rst").read_text()
    (rule,) = re.findall(r"^ +(SUBSYSTEM==.*BLKID_FLAG.*)$", page, re.MULTILINE)
    with area("blkid") as directory:
        node = loops.losetup(make_ext4(directory / "disk.img"))
        loop = loops.look_at(int(node.removeprefix("/dev/loop")))
        assert loop
        # For this device alone: others on this machine have theirs looked at.
        own = rule.replace('"loop*"', f'"{node.removeprefix("/dev/")}"')
        assert own != rule
        try:
            with Udev() as udev:
                assert look_again(udev, node)["ID_FS_TYPE"] == "ext4"
            with Udev({"59-no-blkid-on-loop.rules": own + "\n"}) as udev:
                assert "ID_FS_TYPE" not in look_again(udev, node)
        finally:
            loops.detach_leaked(loop)


def look_again(udev: Udev, node: str) -> dict[str, str]:
    subprocess.run(["udevadm", "trigger", "--settle", "--action=change", node], check=True)
    return udev.properties(node)
