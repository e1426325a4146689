# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what: the callers, polkit's actions, and the table that says which one is needed.

Pure. An operation on a device that is not in the table cannot be served.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from loopd.errors import AccessDenied, LoopError, NotSupported, UnsupportedFile

ROOT = 0
NOBODY = 0xFFFFFFFF
"""The owner of a device that someone else set up: no uid."""


@dataclass(slots=True, eq=False)
class Client:
    """A connection to the bus that has called us; both come from the bus alone."""

    name: str
    uid: int
    left: asyncio.Future[None]
    """Done when the connection is gone."""

    @property
    def gone(self) -> bool:
        """Whether the connection is gone."""
        return self.left.done()

    @property
    def fields(self) -> dict[str, object]:
        """How the log names it."""
        return {"SENDER": self.name, "UID": self.uid}

    def require_present(self) -> None:
        """Raise AccessDenied once the client has left: nothing is done for nobody."""
        if self.gone:
            raise AccessDenied("the caller has left the bus")


@dataclass(frozen=True, slots=True)
class Caller:
    """A client in one call."""

    client: Client
    interactive: bool
    """Whether polkit may ask somebody."""
    concerns: dict[str, object] = field(default_factory=dict)
    """What the log says the call is about, which shows while it is served."""

    @property
    def uid(self) -> int:
        """The client's uid."""
        return self.client.uid


class Action(StrEnum):
    """polkit's actions."""

    ATTACH = "org.example.loop1.attach"
    ATTACH_BLOCK_DEVICE = "org.example.loop1.attach-block-device"
    ATTACH_UNTRUSTED_FILESYSTEM = "org.example.loop1.attach-untrusted-filesystem"
    KEEP = "org.example.loop1.keep"
    OPEN_DEVICE = "org.example.loop1.open-device"
    OPEN_READ_ONLY_DEVICE = "org.example.loop1.open-read-only-device"
    OPEN_OTHERS_DEVICE = "org.example.loop1.open-others-device"
    MANAGE_OTHERS = "org.example.loop1.manage-others"


# A yes to the first is a yes to the second, by the policy file's imply annotations.
_IMPLIED = {
    Action.ATTACH_BLOCK_DEVICE: Action.ATTACH,
    Action.ATTACH_UNTRUSTED_FILESYSTEM: Action.ATTACH,
    Action.KEEP: Action.ATTACH,
}


class Relation(Enum):
    """What a device is to a caller."""

    OWNER = "owner"
    OTHER = "other"
    FOREIGN = "foreign"


class Operation(Enum):
    """What can be done to a device and is not free for everyone."""

    DETACH = "Detach"
    RESIZE = "Resize"
    OPEN = "Open"
    OPEN_READ_ONLY = "Open read-only"
    SYNC = "Sync"
    SET_AUTOCLEAR = "SetAutoclear"
    SET_DIRECT_IO = "SetDirectIO"
    SET_REFERENCE = "SetReference"
    SET_SECTOR_SIZE = "SetSectorSize"
    RESCAN_PARTITIONS = "RescanPartitions"
    LOCK = "Lock"
    HOLD = "Hold"
    SET_LIFETIME = "SetLifetime"
    KEEP = "SetLifetime system"


_FREE: frozenset[Action] = frozenset()
_KEEP = frozenset({Action.KEEP})
_OPEN_DEVICE = frozenset({Action.OPEN_DEVICE})
_OPEN_READ_ONLY_DEVICE = frozenset({Action.OPEN_READ_ONLY_DEVICE})
_OPEN_OTHERS_DEVICE = frozenset({Action.OPEN_OTHERS_DEVICE})
_MANAGE_OTHERS = frozenset({Action.MANAGE_OTHERS})

Needed = frozenset[Action] | type[LoopError]
_TABLE: dict[Operation, tuple[Needed, Needed, Needed]] = {
    # operation: owner, another uid, a foreign device
    Operation.DETACH: (_FREE, _MANAGE_OTHERS, _MANAGE_OTHERS),
    Operation.RESIZE: (_FREE, _MANAGE_OTHERS, _MANAGE_OTHERS),
    Operation.OPEN: (_OPEN_DEVICE, _OPEN_OTHERS_DEVICE, _OPEN_OTHERS_DEVICE),
    # The holder of an fd on a read-only device can put any file of the same size behind it, also
    # one that is open for writing only (LOOP_CHANGE_FD), and so read what it may not read.
    Operation.OPEN_READ_ONLY: (_OPEN_READ_ONLY_DEVICE, _OPEN_OTHERS_DEVICE, _OPEN_OTHERS_DEVICE),
    Operation.SYNC: (_FREE, _MANAGE_OTHERS, _MANAGE_OTHERS),
    Operation.SET_AUTOCLEAR: (_KEEP, _MANAGE_OTHERS, _MANAGE_OTHERS),
    Operation.SET_DIRECT_IO: (_FREE, _MANAGE_OTHERS, _MANAGE_OTHERS),
    Operation.SET_REFERENCE: (_FREE, _MANAGE_OTHERS, _MANAGE_OTHERS),
    Operation.SET_SECTOR_SIZE: (_FREE, _MANAGE_OTHERS, _MANAGE_OTHERS),
    Operation.RESCAN_PARTITIONS: (_FREE, _MANAGE_OTHERS, _MANAGE_OTHERS),
    Operation.LOCK: (_FREE, AccessDenied, NotSupported),
    Operation.HOLD: (_FREE, AccessDenied, NotSupported),
    Operation.SET_LIFETIME: (_FREE, _MANAGE_OTHERS, NotSupported),
    Operation.KEEP: (_KEEP, _MANAGE_OTHERS, NotSupported),
}


def relation(caller_uid: int, owner_uid: int) -> Relation:
    """What a device owned by `owner_uid` is to a caller."""
    if owner_uid == NOBODY:
        return Relation.FOREIGN
    return Relation.OWNER if caller_uid == owner_uid else Relation.OTHER


def needed_for(operation: Operation, relation: Relation) -> frozenset[Action]:
    """The actions polkit has to allow, none where the operation is free.

    Raises the error of a place in the table that nobody may enter.
    """
    needed = _TABLE[operation][list(Relation).index(relation)]
    if isinstance(needed, frozenset):
        return needed
    if needed is NotSupported:
        raise NotSupported(f"{operation.value} is not supported on a device of someone else's")
    raise needed(f"only the owner may call {operation.value} on this device")


def needed_to_attach(
    *, block_device: bool, trusted: bool, wants_number: bool, keeps: bool
) -> frozenset[Action]:
    """The actions for Attach, the weaker ones that are implied left out."""
    needed = {Action.ATTACH}
    if block_device:
        needed.add(Action.ATTACH_BLOCK_DEVICE)
    if not trusted:
        needed.add(Action.ATTACH_UNTRUSTED_FILESYSTEM)
    if wants_number:
        needed.add(Action.MANAGE_OTHERS)
    if keeps:
        needed.add(Action.KEEP)
    return strongest(needed)


def require_may_write(uid: int, guarded_by: str) -> None:
    """Raise UnsupportedFile for a guarded file, whose guard a loop device does not heed.

    `guarded_by` is as in BackingFile. Root is not bound by the guard without a device either.
    """
    if guarded_by and uid != ROOT:
        raise UnsupportedFile(
            f"the file is {guarded_by}, which a loop device would not heed: attach it read-only"
        )


def strongest(actions: Iterable[Action]) -> frozenset[Action]:
    """The actions that are not implied by another one among them."""
    given = frozenset(actions)
    return given - {_IMPLIED[action] for action in given if action in _IMPLIED}
