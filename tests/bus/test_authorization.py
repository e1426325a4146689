# SPDX-License-Identifier: LGPL-2.1-or-later
"""What polkit is asked, in whose name and with what details, and that everything but yes is no."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.area import area
from tests.harness.bus import LOOPD, POLKIT
from tests.harness.caller import DEVICE, MANAGER_PATH, Attached, Caller, options
from tests.harness.deadline import Deadline
from tests.harness.fuse import Fuse
from tests.harness.images import MIB, make_plain, memfd
from tests.harness.polkit import Answer, PolkitDouble, Question
from tests.harness.process import Process
from tests.harness.raw import BUS
from tests.harness.wire import CallError, Variant
from tests.harness.world import OTHER, USER, World

# What is asked and decided is above the reading and writing of messages.
pytestmark = pytest.mark.one_library

PREFIX = "org.example.loop1."
ATTACH = f"{PREFIX}attach"
UNTRUSTED = f"{PREFIX}attach-untrusted-filesystem"
OPEN = f"{PREFIX}open-device"
OPEN_READ_ONLY = f"{PREFIX}open-read-only-device"
OPEN_OTHERS = f"{PREFIX}open-others-device"
MANAGE = f"{PREFIX}manage-others"

DENIED = f"{BUS}.Error.AccessDenied"
CHALLENGED = f"{BUS}.Error.InteractiveAuthorizationRequired"
LIMITS = f"{BUS}.Error.LimitsExceeded"
UNTRUSTED_FILESYSTEM = f"{LOOPD}.Error.UntrustedFilesystem"

SHORT = "[deadlines]\nauthorization = 1\n"
# The flag of a message that lets polkit ask its user.
INTERACTIVE = 4

# What can be done to a device, as a call of its object.
OPERATIONS: dict[str, tuple[str, str, list[Any]]] = {
    "Detach": ("Detach", "a{sv}", [{}]),
    "lazy Detach": ("Detach", "a{sv}", [options(lazy=True)]),
    "Resize": ("Resize", "a{sv}", [{}]),
    "forced Resize": ("Resize", "a{sv}", [options(force=True, size_limit=512)]),
    "Sync": ("Sync", "a{sv}", [{}]),
    "Open r": ("Open", "sa{sv}", ["r", {}]),
    "Open rw": ("Open", "sa{sv}", ["rw", {}]),
}
BY_FD = {"Detach": "b", "Resize": "t"}


def error_of(call: Callable[..., Any], *args: Any, **how: Any) -> str:
    """Return the name of the error that a call ends with."""
    with pytest.raises(CallError) as failure:
        call(*args, **how)
    return failure.value.name


def only_question(polkit: PolkitDouble) -> Question:
    (question,) = polkit.questions
    return question


def operate(caller: Caller, path: str, operation: str, **how: Any) -> Any:
    member, signature, args = OPERATIONS[operation]
    return caller.device(path, member, signature, *args, **how)


def nothing_bound(world: World) -> bool:
    files = [loop.backing_file for loop in loops.bound_loops().values()]
    return not [file for file in files if file.startswith(f"{world.files}/")]


@contextmanager
def foreign_device(path: Path) -> Iterator[loops.BoundLoop]:
    """Attach a file as an administrator would, past loopd."""
    number = int(loops.losetup(path).removeprefix("/dev/loop"))
    found = loops.look_at(number)
    assert found is not None
    try:
        yield found
    finally:
        if loops.loop_is_bound(number, found.diskseq):
            loops.detach_leaked(found)
        loops.wait_unbound(number, found.diskseq)


def path_of(caller: Caller, loop: loops.BoundLoop) -> str:
    """Return the object path of a device that loopd may not have heard of yet."""
    path = f"{MANAGER_PATH}/device/loop{loop.number}_{loop.diskseq}"
    deadline = Deadline()
    while path not in [row[0] for row in caller.manager("ListDevices")[0]]:
        assert deadline.remaining, f"loopd does not see {loop}"
    return path


# The question


def test_attach_asks_one_question_about_the_callers_bus_name(world: World) -> None:
    """CVE-2013-4288, CVE-2019-6133."""
    caller = world.caller()
    caller.attach(world.image(2 * MIB))
    question = only_question(world.polkit)
    assert question.action == ATTACH
    assert question.subject_kind == "system-bus-name"
    assert question.subject == {"name": caller.unique_name}
    # Not by the connection that others' calls come in by.
    (asker,) = world.raw().call_bus("GetConnectionUnixProcessID", "s", [question.asker])
    assert asker == world.daemon.pid
    assert question.asker != world.raw().owner_of(LOOPD)
    assert question.flags == 0
    assert question.cancellation_id
    assert question.details == {
        "read-only": "false",
        "lifetime": "connection",
        "filesystem": subprocess.run(
            ["stat", "-f", "-c", "%T", world.files], check=True, capture_output=True, text=True
        )
        .stdout.strip()
        .replace("ext2/ext3", "ext4"),
        "size": str(2 * MIB),
    }


def test_the_details_follow_the_file_and_the_options(world: World) -> None:
    caller = world.caller()
    caller.attach(world.image(), "r")
    caller.attach(world.image(), read_only=True)
    with memfd(5 * 512) as fd:
        caller.attach(fd)
    first, second, third = world.polkit.questions
    assert first.details["read-only"] == second.details["read-only"] == "true"
    assert third.details["read-only"] == "false"
    assert (third.details["filesystem"], third.details["size"]) == ("tmpfs", str(5 * 512))


def test_no_string_of_the_clients_gets_into_the_details(world: World) -> None:
    caller = world.caller()
    path = world.files / "chosen-by-client.img"
    make_plain(path, owner=USER)
    attached = caller.attach(path, reference="chosen-by-client")
    caller.open_device(attached.path, "r").close()
    assert len(world.polkit.questions) == 2
    for question in world.polkit.questions:
        assert "chosen-by-client" not in repr(question.details)


def test_a_question_about_a_device_names_its_node(world: World) -> None:
    caller = world.caller()
    attached = caller.attach(world.image())
    world.polkit.questions.clear()
    caller.open_device(attached.path, "r").close()
    question = only_question(world.polkit)
    assert (question.action, question.details) == (OPEN, {"device": attached.node})


def test_cancellation_ids_are_never_used_twice(world: World) -> None:
    caller = world.caller()
    for _ in range(5):
        caller.attach(world.image())
    assert len({question.cancellation_id for question in world.polkit.questions}) == 5


def test_the_messages_flag_alone_lets_polkit_prompt(world: World) -> None:
    """Transport rule 6 (handlers)."""
    caller, other = world.caller(), world.caller(OTHER)
    attached = caller.attach(world.image(), interactive=True)
    operate(caller, attached.path, "Open r", interactive=True)[0].close()
    operate(other, attached.path, "Sync", interactive=True)
    assert [question.flags for question in world.polkit.questions] == [1, 1, 1]
    world.polkit.questions.clear()
    operate(caller, attached.path, "Open r")[0].close()
    operate(other, attached.path, "Sync")
    assert [question.flags for question in world.polkit.questions] == [0, 0]


def test_a_yes_is_asked_for_anew_in_each_call(world: World) -> None:
    caller = world.caller()
    caller.attach(world.image())
    world.polkit.on(ATTACH, Answer.DENY)
    assert error_of(caller.attach, world.image()) == DENIED


# The answers


@pytest.mark.parametrize("interactive", [False, True])
def test_no_is_access_denied(world: World, interactive: bool) -> None:
    world.polkit.on(ATTACH, Answer.DENY)
    caller = world.caller()
    assert error_of(caller.attach, world.image(), interactive=interactive) == DENIED
    assert nothing_bound(world)


def test_a_challenge_nobody_may_answer_is_told_so(world: World) -> None:
    world.polkit.on(ATTACH, Answer.CHALLENGE)
    caller = world.caller()
    assert error_of(caller.attach, world.image()) == CHALLENGED
    assert only_question(world.polkit).flags == 0
    assert nothing_bound(world)


def test_a_challenge_that_was_not_met_is_access_denied(world: World) -> None:
    """With the flag polkit has asked somebody, and a challenge is what is left of that."""
    world.polkit.on(ATTACH, Answer.CHALLENGE)
    caller = world.caller()
    assert error_of(caller.attach, world.image(), interactive=True) == DENIED


def test_an_error_of_polkit_is_access_denied(world: World) -> None:
    """CVE-2021-3560."""
    world.polkit.on(ATTACH, Answer.ERROR)
    assert error_of(world.caller().attach, world.image()) == DENIED
    assert nothing_bound(world)


def test_a_polkit_that_dies_in_the_midst_means_no_and_one_that_comes_back_is_asked(
    new_world: Callable[..., World],
) -> None:
    """CVE-2021-3560."""
    world = new_world()
    caller = world.caller()
    world.polkit.on(ATTACH, Answer.DIE)
    assert error_of(caller.attach, world.image()) == DENIED
    assert nothing_bound(world)
    world.polkit.on(ATTACH, Answer.ALLOW)
    world.polkit.start()
    caller.attach(world.image())


def test_without_any_polkit_nobody_but_root_may(new_world: Callable[..., World]) -> None:
    """CVE-2021-3560."""
    world = new_world(authority=None)
    root, caller = world.caller(None), world.caller()
    assert error_of(caller.attach, world.image()) == DENIED
    attached = root.attach(world.image())
    for operation in OPERATIONS:
        assert error_of(operate, caller, attached.path, operation) == DENIED, operation
    root.detach(attached.path)


def test_answers_that_are_no_answers_mean_no(new_world: Callable[..., World]) -> None:
    """CVE-2021-3560: of the right form, but not a boolean true; and of wrong forms."""
    world = new_world(authority=None)
    with world.bus.connect() as liar:
        liar.call_bus("RequestName", "su", [POLKIT, 4])
        caller = world.caller()
        answers: list[tuple[str, list[Any]]] = [
            ("", []),
            ("b", [True]),
            ("(b)", [(True,)]),
            ("(uba{ss})", [(1, False, {})]),
            ("(sba{ss})", [("yes", False, {})]),
            ("(bba{ss})s", [(True, False, {}), "more"]),
            ("a(bba{ss})", [[(True, False, {})]]),
            ("v", [Variant("(bba{ss})", (True, False, {}))]),
            ("bba{ss}", [True, False, {}]),
        ]
        for signature, body in answers:
            call = caller.attach_begin(world.image())
            question = liar.receive_where(
                lambda message: message.member == "CheckAuthorization", "the question"
            )
            liar.send(
                None,
                None,
                None,
                signature,
                body,
                type=2,
                reply_serial=question.serial,
                destination=question.sender,
            )
            assert error_of(call.end) == DENIED, signature


def test_an_answer_from_somebody_else_is_no_answer(new_world: Callable[..., World]) -> None:
    """Transport rule 8 (peers): the bus itself drops a reply that was not asked of its sender,
    which loopd relies on.
    """
    world = new_world(authority=Answer.HANG, config=SHORT)
    caller, liar = world.caller(), world.raw(OTHER)
    call = caller.attach_begin(world.image())
    question = world.polkit.wait_question(ATTACH)
    for serial in range(1, question.serial + 2):
        liar.send(
            None,
            None,
            None,
            "(bba{ss})",
            [(True, False, {})],
            type=2,
            reply_serial=serial,
            destination=question.asker,
        )
    assert error_of(call.end) == DENIED


# The deadline


def test_a_polkit_that_does_not_answer_means_no_and_gets_the_question_back(
    new_world: Callable[..., World],
) -> None:
    """Transport rule 8 (peers)."""
    world = new_world(authority=Answer.HANG, config=SHORT)
    caller = world.caller()
    assert error_of(caller.attach, world.image()) == DENIED
    world.polkit.wait_cancelled(only_question(world.polkit))
    assert nothing_bound(world)


def test_a_stopped_polkit_means_no_and_its_late_yes_attaches_nothing(
    new_world: Callable[..., World],
) -> None:
    """Transport rule 8 (peers)."""
    world = new_world(authority=None, config=SHORT)
    with world.bus.connect() as polkit:
        polkit.call_bus("RequestName", "su", [POLKIT, 4])
        caller = world.caller()
        call = caller.attach_begin(world.image())
        question = polkit.receive_where(
            lambda message: message.member == "CheckAuthorization", "the question"
        )
        assert error_of(call.end) == DENIED
        polkit.send(
            None,
            None,
            None,
            "(bba{ss})",
            [(True, False, {})],
            type=2,
            reply_serial=question.serial,
            destination=question.sender,
        )
        # loopd has the answer, and has had time for what it should not do.
        polkit.call_bus("GetId")
        for _ in range(20):
            assert world.device_count() == 0
        assert nothing_bound(world)


def test_somebody_who_is_asked_has_longer(new_world: Callable[..., World]) -> None:
    """Both deadlines count from the question, so the shorter one passing shows the other."""
    config = "[deadlines]\nauthorization = 1\ninteractive_authorization = 20\n"
    world = new_world(authority=Answer.HANG, config=config)
    caller = world.caller()
    patient = caller.attach_begin(world.image(), interactive=True)
    first = world.polkit.wait_question(count=1)
    assert error_of(caller.attach, world.image()) == DENIED
    assert first.cancellation_id not in world.polkit.cancelled
    world.polkit.release(Answer.ALLOW, first)
    assert world.daemon.process.status is None
    Attached(*patient.end())


def test_the_interactive_deadline_ends_too(new_world: Callable[..., World]) -> None:
    config = "[deadlines]\ninteractive_authorization = 1\n"
    world = new_world(authority=Answer.HANG, config=config)
    assert error_of(world.caller().attach, world.image(), interactive=True) == DENIED
    world.polkit.wait_cancelled(only_question(world.polkit))


def test_what_hangs_in_polkit_is_in_nobody_elses_way(world: World) -> None:
    world.polkit.on(ATTACH, Answer.HANG)
    caller, root = world.caller(), world.caller(None)
    call = caller.attach_begin(world.image())
    world.polkit.wait_question()
    root.detach(root.attach(world.image()).path)
    world.polkit.release(Answer.DENY)
    assert error_of(call.end) == DENIED


# Open questions


def test_the_fifth_open_question_of_a_user_is_refused_and_others_are_asked_about(
    world: World,
) -> None:
    world.polkit.on(ATTACH, Answer.HANG)
    first, second, other = world.caller(), world.caller(), world.caller(OTHER)
    calls = [caller.attach_begin(world.image()) for caller in (first, second, first, second)]
    world.polkit.wait_question(count=4)
    for caller in (first, second):
        with pytest.raises(CallError, match="4") as failure:
            caller.attach(world.image())
        assert failure.value.name == LIMITS
    calls.append(other.attach_begin(world.image(owner=OTHER)))
    fifth = world.polkit.wait_question(count=5)
    assert fifth.bus_name == other.unique_name
    world.polkit.release(Answer.ALLOW)
    for call in calls:
        Attached(*call.end())
    world.polkit.on(ATTACH, Answer.ALLOW)
    first.attach(world.image())


def test_questions_that_many_users_leave_open_keep_nobody_elses_from_being_answered(
    new_world: Callable[..., World],
) -> None:
    """Limits in all: dbus-daemon lets 128 calls of a connection's wait for their answers."""
    uids = range(100_000, 100_040)
    world = new_world(accounts=uids)
    world.polkit.on(ATTACH, Answer.ASK)
    with ExitStack() as stack:
        file = stack.enter_context(memfd())
        clients = [stack.enter_context(world.bus.connect(uid)) for uid in uids]
        for client in clients:
            for _ in range(4):
                args = (MANAGER_PATH, LOOPD, "Attach", "ha{sv}", [0, {}])
                client.send(*args, fds=[file], flags=INTERACTIVE)
            # So that each user's are asked, or refused, before the next one's.
            client.call(MANAGER_PATH, f"{BUS}.Peer", "Ping")
        world.polkit.on(ATTACH, Answer.ALLOW)
        caller = world.caller()
        caller.attach(world.image())
        caller.attach(world.image(), interactive=True)
        # It has to wait for somebody to be asked, and too many do.
        world.polkit.on(ATTACH, Answer.CHALLENGE)
        assert error_of(caller.attach, world.image(), interactive=True) == LIMITS
        assert error_of(caller.attach, world.image()) == CHALLENGED


# Who is asked for what


def test_root_asks_nothing(world: World) -> None:
    root, caller = world.caller(None), world.caller()
    own = root.attach(world.image())
    others = caller.attach(world.image())
    world.polkit.questions.clear()
    world.polkit.default = Answer.DENY
    for path in (own.path, others.path):
        for operation in ("Resize", "Sync", "Open r", "Open rw", "Detach"):
            result = operate(root, path, operation)
            if operation.startswith("Open"):
                result[0].close()
    assert world.polkit.questions == []


def test_the_owner_asks_nothing_but_to_open(world: World) -> None:
    caller, same_user = world.caller(), world.caller()
    attached = caller.attach(world.image())
    world.polkit.reset(Answer.DENY)
    for member in (caller, same_user):
        operate(member, attached.path, "Resize")
        operate(member, attached.path, "Sync")
        for operation in ("Open r", "Open rw"):
            assert error_of(operate, member, attached.path, operation) == DENIED
    assert {question.action for question in world.polkit.questions} == {OPEN}
    assert len(world.polkit.questions) == 4
    world.polkit.questions.clear()
    assert operate(same_user, attached.path, "Detach") == (True,)
    assert world.polkit.questions == []


def managing(operation: str) -> str:
    """The action for what is done to a device of somebody else's."""
    return OPEN_OTHERS if operation.startswith("Open") else MANAGE


def test_a_device_that_became_read_only_while_polkit_thought_is_not_opened(world: World) -> None:
    """LOOP_CHANGE_FD: what was allowed was the opening of a writable one."""
    caller = world.caller()
    attached = caller.attach(world.image())
    world.polkit.on(OPEN, Answer.HANG)
    call = caller.call_begin(attached.path, DEVICE, "Open", "sa{sv}", "r", {})
    world.polkit.wait_question(count=2)
    with loops.set_read_only(attached.node):
        world.polkit.release(Answer.ALLOW)
        with pytest.raises(CallError, match="read-only") as failure:
            call.end()
        assert failure.value.name == f"{LOOPD}.Error.DeviceBusy"
        world.polkit.questions.clear()
        caller.open_device(attached.path, "r").close()
    assert [question.action for question in world.polkit.questions] == [OPEN_READ_ONLY]


@pytest.mark.parametrize(
    ("operation", "read_only"), [("Open r", False), ("Open r", True), ("Open rw", False)]
)
def test_who_manages_others_does_not_open_for_that(
    world: World, operation: str, read_only: bool
) -> None:
    caller, other = world.caller(), world.caller(OTHER)
    attached = caller.attach(world.image(), read_only=read_only)
    world.polkit.reset(Answer.ALLOW)
    world.polkit.on(OPEN_OTHERS, Answer.DENY)
    assert error_of(operate, other, attached.path, operation) == DENIED
    assert [question.action for question in world.polkit.questions] == [OPEN_OTHERS]


def test_nobody_is_asked_for_what_cannot_be_opened(world: World) -> None:
    attached = world.caller().attach(world.image(), "r")
    world.polkit.questions.clear()
    for caller in (world.caller(), world.caller(OTHER), world.caller(None)):
        with pytest.raises(CallError, match="mode") as failure:
            caller.open_device(attached.path, "rw")
        assert failure.value.name == f"{BUS}.Error.InvalidArgs"
    assert world.polkit.questions == []


@pytest.mark.parametrize("operation", OPERATIONS)
def test_another_users_device_needs_one_action_and_nothing_else(
    world: World, operation: str
) -> None:
    caller, other = world.caller(), world.caller(OTHER)
    attached = caller.attach(world.image())
    world.polkit.reset(Answer.ALLOW)
    world.polkit.on(managing(operation), Answer.DENY)
    before = caller.get_all(attached.path)
    assert error_of(operate, other, attached.path, operation) == DENIED
    question = only_question(world.polkit)
    assert (question.action, question.bus_name) == (managing(operation), other.unique_name)
    assert question.details == {"device": attached.node}
    assert caller.get_all(attached.path) == before
    world.polkit.reset(Answer.DENY)
    world.polkit.on(managing(operation), Answer.ALLOW)
    operate(other, attached.path, operation)
    assert [question.action for question in world.polkit.questions] == [managing(operation)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_foreign_device_needs_one_action_and_nothing_else(world: World, operation: str) -> None:
    caller = world.caller()
    with foreign_device(world.image(owner=None)) as loop:
        path = path_of(caller, loop)
        world.polkit.on(managing(operation), Answer.DENY)
        assert error_of(operate, caller, path, operation) == DENIED
        assert [question.action for question in world.polkit.questions] == [managing(operation)]
        assert loops.loop_is_bound(loop.number, loop.diskseq)
        world.polkit.reset(Answer.DENY)
        world.polkit.on(managing(operation), Answer.ALLOW)
        result = operate(caller, path, operation)
        assert [question.action for question in world.polkit.questions] == [managing(operation)]
        if "Open" in operation:
            result[0].close()
        if "Detach" in operation:
            assert not loops.loop_is_bound(loop.number, loop.diskseq)
        else:
            assert loops.loop_is_bound(loop.number, loop.diskseq)


@pytest.mark.parametrize("member", BY_FD)
@pytest.mark.parametrize("by", ["node", "file"])
def test_an_fd_gives_no_more_rights_than_its_bearer_has(world: World, member: str, by: str) -> None:
    """Nobody's file can be read by all, and its device's node by nobody but root."""
    # A file names no device of another user's, but those of root's.
    caller, other = world.caller(None if by == "file" else USER), world.caller(OTHER)
    path = world.image()
    attached = caller.attach(path)
    world.polkit.reset(Answer.DENY)
    fd = os.open(attached.node if by == "node" else path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        name = error_of(other.manager, member, "ha{sv}", 0, {}, fds=[fd])
    finally:
        os.close(fd)
    assert name == DENIED
    assert [question.action for question in world.polkit.questions] == [MANAGE]
    assert caller.get(attached.path, "State") == "attached"


@pytest.mark.parametrize("answer", [Answer.DENY, Answer.CHALLENGE, Answer.ERROR, Answer.DIE])
def test_operations_take_everything_but_yes_for_no(
    new_world: Callable[..., World], answer: Answer
) -> None:
    """CVE-2021-3560."""
    world = new_world()
    caller, other = world.caller(), world.caller(OTHER)
    attached = caller.attach(world.image())
    for operation in OPERATIONS:
        world.polkit.reset(Answer.ALLOW)
        world.polkit.on(managing(operation), answer)
        expected = CHALLENGED if answer is Answer.CHALLENGE else DENIED
        assert error_of(operate, other, attached.path, operation) == expected, operation
        if answer is Answer.DIE:
            world.polkit.start()
    assert caller.get(attached.path, "State") == "attached"


def test_the_device_may_go_while_polkit_thinks(world: World) -> None:
    """CVE-2021-3560: what polkit said yes to is gone then, and its number may have come to mean
    another.
    """
    caller, other = world.caller(), world.caller(OTHER)
    settings: dict[str, tuple[str, str, list[Any]]] = {
        "SetDirectIO": ("SetDirectIO", "ba{sv}", [False, {}]),
        "SetReference": ("SetReference", "sa{sv}", ["name", {}]),
        "SetSectorSize": ("SetSectorSize", "ua{sv}", [4096, {}]),
        "RescanPartitions": ("RescanPartitions", "a{sv}", [{}]),
    }
    for operation, (member, signature, args) in (OPERATIONS | settings).items():
        attached = caller.attach(world.image())
        world.polkit.on(managing(operation), Answer.HANG)
        call = other.call_begin(attached.path, f"{LOOPD}.Device", member, signature, *args)
        question = world.polkit.wait_question(managing(operation))
        caller.detach(attached.path)
        again = caller.attach(world.image())
        world.polkit.release(Answer.ALLOW, question)
        name = error_of(call.end)
        assert name == f"{LOOPD}.Error.NoSuchDevice", operation
        assert caller.get(again.path, "State") == "attached"
        assert caller.get(again.path, "Size") == MIB
        assert caller.get(again.path, "Reference") == ""
        assert caller.get(again.path, "SectorSize") == 512
        caller.detach(again.path)
        world.polkit.reset(Answer.ALLOW)


def test_a_caller_that_leaves_takes_its_question_about_a_device_back(world: World) -> None:
    """CVE-2021-3560."""
    caller, other = world.caller(), world.caller(OTHER)
    attached = caller.attach(world.image())
    world.polkit.on(MANAGE, Answer.HANG)
    other.call_begin(attached.path, f"{LOOPD}.Device", "Detach", "a{sv}", {})
    question = world.polkit.wait_question(MANAGE)
    other.kill()
    world.polkit.wait_cancelled(question)
    assert caller.get(attached.path, "State") == "attached"


# The file's filesystem


@contextmanager
def hidden_mount(kind: str) -> Iterator[Path]:
    """Mount something that nobody sees but one process; yield a way into it."""
    with area("hidden") as directory:
        reading, writing = os.pipe()
        mount = f"mount -t {kind} none {directory}; echo > /proc/self/fd/{writing}"
        try:
            mounter = Process(
                [
                    *("unshare", "--mount", "--propagation", "private"),
                    *("sh", "-euc", f"{mount}; exec sleep infinity"),
                ],
                name="mounter",
                pass_fds=[writing],
            )
            with mounter:
                Deadline().wait_readable([reading, mounter.pidfd], "the mount")
                assert mounter.status is None, mounter.log.text
                yield Path(f"/proc/{mounter.pid}/root{directory}")
        finally:
            os.close(reading)
            os.close(writing)


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_file_on_a_filesystem_that_cannot_be_seen_needs_the_stronger_action_alone(
    world: World,
) -> None:
    caller = world.caller()
    world.polkit.on(UNTRUSTED, Answer.DENY)
    with hidden_mount("ramfs") as directory, opened(make_plain(directory / "file")) as fd:
        assert error_of(caller.attach, fd) == UNTRUSTED_FILESYSTEM
        question = only_question(world.polkit)
        assert (question.action, question.details["filesystem"]) == (UNTRUSTED, "unknown")
        world.polkit.on(UNTRUSTED, Answer.CHALLENGE)
        assert error_of(caller.attach, fd) == CHALLENGED
        world.polkit.reset(Answer.DENY)
        world.polkit.on(UNTRUSTED, Answer.ALLOW)
        attached = caller.attach(fd)
        assert [question.action for question in world.polkit.questions] == [UNTRUSTED]
        caller.detach(attached.path)


@pytest.mark.parametrize("kind", ["fuse", "fuse.loopd"])
def test_a_file_on_fuse_needs_the_stronger_action_alone(world: World, kind: str) -> None:
    """Hanging files."""
    caller = world.caller()
    world.polkit.default = Answer.DENY
    with Fuse(kind=kind) as fuse:
        assert error_of(caller.attach, fuse.file) == UNTRUSTED_FILESYSTEM
        question = only_question(world.polkit)
        # The subtype is a string that whoever mounted it chose.
        assert (question.action, question.details["filesystem"]) == (UNTRUSTED, "fuse")
        world.polkit.on(UNTRUSTED, Answer.ALLOW)
        attached = caller.attach(fuse.file)
        assert [question.action for question in world.polkit.questions] == [UNTRUSTED] * 2
        assert caller.detach(attached.path) is True


@pytest.mark.parametrize(
    ("trusted", "expected"),
    [("fuse", ATTACH), ("nfs", UNTRUSTED)],
)
def test_a_type_that_the_administrator_trusts_needs_the_weaker_action(
    new_world: Callable[..., World], trusted: str, expected: str
) -> None:
    """A subtype of FUSE cannot be trusted, since anyone who mounts can claim it."""
    world = new_world(authority=Answer.DENY, config=f'trusted_filesystems = ["{trusted}"]\n')
    caller = world.caller()
    world.polkit.on(expected, Answer.ALLOW)
    with Fuse(kind="fuse.loopd") as fuse:
        caller.detach(caller.attach(fuse.file).path)
    assert only_question(world.polkit).action == expected


def test_a_tmpfs_that_cannot_be_seen_is_known_by_its_seals(world: World) -> None:
    caller = world.caller()
    world.polkit.on(UNTRUSTED, Answer.DENY)
    with hidden_mount("tmpfs") as directory, opened(make_plain(directory / "file")) as fd:
        caller.detach(caller.attach(fd).path)
    question = only_question(world.polkit)
    assert (question.action, question.details["filesystem"]) == (ATTACH, "tmpfs")


def test_what_cannot_be_seen_has_no_type_that_could_be_trusted(
    new_world: Callable[..., World],
) -> None:
    world = new_world(config='trusted_filesystems = ["unknown", "ramfs"]\n')
    caller = world.caller()
    with hidden_mount("ramfs") as directory, opened(make_plain(directory / "file")) as fd:
        caller.detach(caller.attach(fd).path)
    assert only_question(world.polkit).action == UNTRUSTED
