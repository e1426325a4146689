# SPDX-License-Identifier: LGPL-2.1-or-later
"""A double of loopd on a private bus that says of its one device what the test has it say."""

import os
from typing import Any

from tests.harness import wire
from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.double import Double
from tests.harness.raw import BUS
from tests.harness.wire import Variant

PATH = "/org/example/Loop1/device/loop3_41"
DEVICE = f"{LOOPD}.Device"
_FACTS = {
    "Node": Variant("s", "/dev/loop3"),
    "Number": Variant("u", 3),
    "DeviceNumber": Variant("t", os.makedev(7, 3)),
    "Diskseq": Variant("t", 41),
    "BackingFile": Variant("ay", b"/tmp/disk.img\0"),
    "BackingDevice": Variant("t", 1),
    "BackingInode": Variant("t", 2),
    "Offset": Variant("t", 0),
    "SizeLimit": Variant("t", 0),
    "Size": Variant("t", 4096),
    "SectorSize": Variant("u", 512),
    "ReadOnly": Variant("b", False),
    "DirectIO": Variant("b", True),
    "Autoclear": Variant("b", True),
    "PartitionScan": Variant("b", False),
    "Partitions": Variant("a(ustt)", []),
    "Reference": Variant("s", ""),
    "Owner": Variant("u", 0),
    "Holder": Variant("s", ":1.9"),
    "Lifetime": Variant("s", "connection"),
    "Holds": Variant("u", 0),
    "Locked": Variant("s", "none"),
    "Managed": Variant("b", True),
    "State": Variant("s", "attached"),
    "AttachedAt": Variant("t", 1),
}
_MANAGER = {
    "Version": Variant("s", "1"),
    "DeviceCount": Variant("u", 1),
    "MaxDevices": Variant("u", 1024),
    "MaxDevicesPerUser": Variant("u", 32),
}


class LoopdDouble(Double):
    """Answers each call as loopd would, but for the lies that it is told."""

    name = LOOPD

    def __init__(self, bus: PrivateBus) -> None:
        """Tell the truth for now."""
        super().__init__(bus)
        self.device: dict[str, Variant] = {}
        """Properties of the device that are other than they should be."""
        self.manager: dict[str, Variant] = {}
        """The same of the manager."""
        self.answers: dict[str, tuple[str, list[Any]]] = {}
        """Signature and body of answers to methods that are other than they should be."""

    def _answer(self, message: wire.Message) -> None:
        for fd in message.fds:
            os.close(fd)
        device = _FACTS | self.device
        of_device = message.interface == f"{BUS}.Properties" and message.body[0] == DEVICE
        answers: dict[str, tuple[str, list[Any]]] = {
            "Attach": ("ost", [PATH, "/dev/loop3", 41]),
            "GetDevice": ("o", [PATH]),
            "GetDeviceByNode": ("o", [PATH]),
            "Detach": ("b", [True]),
            "Resize": ("t", [4096]),
            "SetDirectIO": ("b", [True]),
            "GetManagedObjects": ("a{oa{sa{sv}}}", [{PATH: {DEVICE: device}}]),
            "GetAll": ("a{sv}", [device if of_device else _MANAGER | self.manager]),
        }
        signature, body = (answers | self.answers).get(str(message.member), ("", []))
        self._reply(message, signature, *body)
