# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl's commands that come and go, on real loop devices with a real polkitd."""

import json
import os
import pwd
import re
import signal
import socket
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from loopd.client import Disconnected, blocking
from loopd.errors import InvalidArgs, NoSuchDevice
from tests.harness.area import area as make_area
from tests.harness.daemon import Daemon
from tests.harness.images import MIB, make_gpt, make_mbr, pattern
from tests.harness.logind import LogindDouble
from tests.harness.loopctl import (
    Loopctl,
    Running,
    copy_package,
    number_of,
    one_sentence,
    read_until,
    terminal,
)
from tests.harness.loops import detach_leaked, look_at, loop_is_bound, losetup, wait_unbound
from tests.harness.polkit import RULES_NONE
from tests.harness.world import OTHER, USER, World, make_world
from tests.unit.test_completion import bash

UID = pwd.getpwnam(USER).pw_uid


@pytest.fixture(scope="module")
def package() -> Iterator[Path]:
    """A directory with the package that every uid can read."""
    with make_area("package") as directory:
        yield copy_package(directory)


@pytest.fixture
def logind(world: World) -> Iterator[LogindDouble]:
    """A logind that knows USER; who is attached for goes with the test."""
    with LogindDouble(world.bus, UID) as double:
        yield double
        for uid in list(double.users):
            double.remove(uid)
        world.wait_devices(0)


@pytest.fixture
def loopctl(world: World, package: Path) -> Loopctl:
    return Loopctl(world.bus, package, world.files)


@pytest.fixture
def attached(world: World, logind: LogindDouble, loopctl: Loopctl) -> tuple[str, Path]:
    """A device of USER's that stays, and its file."""
    image = world.image()
    status, out, err = loopctl.run("attach", image)
    assert (status, err) == (0, "")
    return out.rstrip("\n"), image


# --- attach -------------------------------------------------------------------------------------


def test_what_a_user_attaches_stays_until_the_user_has_left(
    loopctl: Loopctl, attached: tuple[str, Path], logind: LogindDouble
) -> None:
    node, image = attached
    shown = loopctl.json("show", node, user=OTHER)
    assert (shown["lifetime"], shown["owner"]) == ("user", UID)
    assert shown["backing_file"] == str(image)
    logind.remove(UID)
    wait_unbound(shown["number"], shown["diskseq"])


def test_what_root_attaches_stays_until_somebody_detaches_it(
    world: World, loopctl: Loopctl
) -> None:
    told = loopctl.json("attach", world.image(), user="root")
    assert loopctl.json("show", told["node"])["lifetime"] == "system"
    assert loopctl.run("detach", told["node"], user="root") == (0, "", "")
    assert not loop_is_bound(number_of(told["node"]), told["diskseq"])


def test_attach_can_be_told_to_stay(world: World, loopctl: Loopctl) -> None:
    with loopctl.start(
        "attach", "--lifetime=connection", "--lock=shared", world.image()
    ) as running:
        shown = loopctl.json("show", running.line())
        assert (shown["lifetime"], shown["locked"]) == ("connection", "shared")
        running.signal(signal.SIGTERM)
        assert running.end()[0] == 0
    assert not loop_is_bound(shown["number"], shown["diskseq"])


def test_where_nobody_tells_when_a_user_leaves_hold_does_it(world: World, loopctl: Loopctl) -> None:
    status, out, err = loopctl.run("attach", world.image())
    assert (status, out) == (9, "")
    assert one_sentence(err)
    assert "'loopctl hold'" in err


def test_nothing_is_left_that_nobody_has_heard_of(
    world: World, logind: LogindDouble, loopctl: Loopctl
) -> None:
    with open("/dev/full", "wb") as full:
        status, _, err = loopctl.run("attach", world.image(), stdout=full)
    assert status == 1
    assert err == "loopctl: cannot write: No space left on device\n"
    assert world.device_count() == 0


def test_without_a_stdout_nothing_is_left_either(
    world: World, logind: LogindDouble, loopctl: Loopctl
) -> None:
    for command in ("attach", "hold"):
        status, _, err = loopctl.run(command, world.image(), preexec_fn=lambda: os.close(1))
        assert (status, err) == (1, "loopctl: cannot write: Bad file descriptor\n")
        world.wait_devices(0)


def test_somebody_at_a_terminal_is_told_for_how_long(
    world: World, logind: LogindDouble, loopctl: Loopctl
) -> None:
    image = world.image()
    with terminal() as (keyboard, screen):
        status, out, _ = loopctl.run("attach", image, stderr=screen)
        assert status == 0
        read_until(keyboard, rf"{out.strip()} is {image} \(1 MiB, .*\) until you have logged out")


@contextmanager
def disk_of(image: Path, *arguments: str) -> Iterator[str]:
    """A block device that losetup has made; its node."""
    node = losetup(image, *arguments)
    loop = look_at(number_of(node))
    assert loop is not None
    try:
        yield node
    finally:
        detach_leaked(loop)


def test_roots_block_device_gets_a_loop_device(world: World, loopctl: Loopctl) -> None:
    """As losetup has it: something has to be there until somebody detaches it."""
    with disk_of(world.image()) as node:
        told = loopctl.json("attach", node, user="root")
        shown = loopctl.json("show", told["node"])
        assert (shown["backing_file"], shown["lifetime"]) == (node, "system")
        assert told["node"] != node
        assert loopctl.run("detach", told["node"], user="root") == (0, "", "")


def test_a_block_device_without_a_partition_table_is_said_to_need_no_loop_device(
    world: World, loopctl: Loopctl
) -> None:
    with disk_of(world.image()) as node:
        status, upper, err = loopctl.run("run", "-P", node, "--", "echo", "{}", user="root")
        assert status == 0
        assert err == (
            f"loopctl: {upper.strip()} has no partitions, as there is no table: a block device can "
            "be used without a loop device then\n"
        )


def test_direct_io_that_does_not_take_is_told_with_its_reason(
    world: World, loopctl: Loopctl
) -> None:
    begin = ("run", "--direct-io=on")
    with disk_of(world.image(), "--sector-size", "4096") as node:
        *_, err = loopctl.run(*begin, "-b", "512", node, "--", "true", user="root")
        assert (
            "its sectors have 512 bytes, and the file asks for 4096, as -b 4096 makes them" in err
        )
        assert one_sentence(err)
        taken = loopctl.run(*begin, "-b", "4096", "-o", "4096", node, "--", "true", user="root")
        assert taken == (0, "", "")
        with loopctl.start("hold", "-b512", node, user="root") as running:
            change = ("set", "--direct-io=on", running.line())
            *_, err = loopctl.run(*change, user="root")
            assert "its sectors have 512 bytes, and the file asks for 4096" in err
            running.signal(signal.SIGTERM)
            running.end()
    image = world.image()
    reason = re.compile(r"its offset, 188392, is no multiple of \d+, as the file asks for\n")
    with loopctl.start("hold", "--direct-io=on", "-o", "188392", image, user="root") as running:
        for target in (running.line(), image):
            *_, err = loopctl.run("set", "--direct-io=on", target, user="root")
            assert reason.search(err)
            assert one_sentence(err)
        running.signal(signal.SIGTERM)
        assert reason.search(running.end()[2])


def test_a_file_that_is_compressed_is_said_to_be_so(world: World, loopctl: Loopctl) -> None:
    disk = make_gpt(world.new_path(), sparse=True, owner=USER)
    subprocess.run(["xz", disk], check=True)
    packed = disk.with_name(disk.name + ".xz")
    status, _, err = loopctl.run("run", "-P", packed, "--", "true", user="root")
    assert status == 0
    assert err == (
        f"loopctl: {packed} seems to be compressed by xz, and no image of a disk as it is: make "
        "one of it with 'unxz'\n"
    )


@pytest.mark.parametrize("command", ["run", "hold"])
def test_in_a_sandbox_without_nodes_open_is_named_and_works(
    world: World, loopctl: Loopctl, command: str
) -> None:
    """As with PrivateDevices=yes."""
    script = 'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec "$@"'
    sandbox = ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh")
    image = world.image()
    if command == "run":
        words = ("run", image, "--", "echo", "{}")
        status, node, err = loopctl.run(*words, user="root", before=sandbox)
        assert status == 0
    else:
        with loopctl.start("hold", image, user="root", before=sandbox) as running:
            node = running.line()
            words = ("open", node, "--", "sh", "-c", "wc -c <&$LOOPFD")
            assert loopctl.run(*words, user="root", before=sandbox) == (0, f"{MIB}\n", "")
            running.signal(signal.SIGTERM)
            *_, err = running.end()
    assert err.startswith(
        f"loopctl: {node.strip()} is not in this /dev, as in a sandbox: 'loopctl open' runs "
    )


# --- detach -------------------------------------------------------------------------------------


def test_all_of_ones_own_are_detached_and_no_others(
    world: World, loopctl: Loopctl, attached: tuple[str, Path]
) -> None:
    others = loopctl.json("attach", world.image(), user="root")["node"]
    # Backed by the first, which is in use until this one is gone.
    stacked = loopctl.json("attach", attached[0], user="root")["node"]
    assert loopctl.run("detach", stacked, user="root")[0] == 0
    mine = loopctl.json("attach", world.image())["node"]
    told = loopctl.json("detach", "--all")["devices"]
    assert [each["node"] for each in told] == [mine, attached[0]]
    assert all(each["gone"] for each in told)
    assert [each["node"] for each in loopctl.json("detach", "--all", user="root")["devices"]] == [
        others
    ]


def test_the_devices_of_a_file_are_listed_and_detached(
    world: World, loopctl: Loopctl, attached: tuple[str, Path]
) -> None:
    node, image = attached
    second = loopctl.json("attach", "--allow-overlap", image)["node"]
    other = loopctl.json("attach", world.image())["node"]
    listed = loopctl.json("list", "-j", image)["loopdevices"]
    assert {each["name"] for each in listed} == {node, second}
    status, out, err = loopctl.run("detach", image)  # which of them?
    assert (status, out) == (5, "")
    assert one_sentence(err)
    assert loopctl.run("detach", "-j", image) == (0, "", "")
    assert loopctl.run("list", "-j", image) == (0, "", "")
    assert loopctl.run("list", "-j", image.with_name("missing")) == (0, "", "")
    assert loopctl.run("detach", other) == (0, "", "")


# --- list ---------------------------------------------------------------------------------------


def test_a_list_says_what_losetup_says(
    world: World, logind: LogindDouble, loopctl: Loopctl
) -> None:
    image = world.image()
    options = "-r -o 64K --sizelimit 128K -b 1024 --direct-io=off --json".split()
    node = loopctl.json("attach", *options, image)["node"]
    names = "NAME,AUTOCLEAR,BACK-FILE,BACK-INO,BACK-MAJ:MIN,MAJ:MIN,OFFSET,PARTSCAN,RO,SIZELIMIT,"
    names += "DIO,LOG-SEC"
    losetup = ["losetup", "--json", "--list", "--output", names, node]
    done = subprocess.run(losetup, check=True, capture_output=True, text=True)
    (theirs,) = json.loads(done.stdout)["loopdevices"]
    (ours,) = loopctl.json("list", "-O", names, "-j", image)["loopdevices"]
    numbers = {name: str(each).strip() for name, each in theirs.items() if "maj" in name}
    assert ours == theirs | numbers


def test_the_habits_of_losetup_do_what_losetup_does(
    world: World, logind: LogindDouble, loopctl: Loopctl
) -> None:
    image = make_gpt(world.image())
    status, out, err = loopctl.run("-fP", "--show", "-o", "0", image)
    node = out.rstrip("\n")
    assert (status, err) == (0, "")
    assert len(loopctl.json("show", node)["partitions"]) == 2
    for arguments in (["-l", node], [node], ["list", node], ["-j", image, "-o", "0"]):
        assert loopctl.run(*arguments, "-nO", "NAME") == (0, f"{node}\n", "")
    names = "NAME,OFFSET,BACK-FILE,RO"
    done = subprocess.run(
        ["losetup", "--raw", "-O", names, node], check=True, capture_output=True, text=True
    )
    assert loopctl.run("--raw", "-O", names, "-l", node) == (0, done.stdout, "")
    assert loopctl.run("-j", image, "-o", "512") == (0, "", "")
    os.truncate(image, 2 * os.stat(image).st_size)
    status, out, err = loopctl.run("-c", node)
    assert (status, err) == (0, "")
    assert str(os.stat(image).st_size) in out
    assert loopctl.run("--direct-io=off", node) == (0, "", "")
    assert loopctl.json("show", node)["direct_io"] is False
    assert loopctl.run("-d", node) == (0, "", "")
    status, out, err = loopctl.run("list", "loop1048575")
    assert (status, out) == (5, "")
    assert one_sentence(err)


def test_columns_are_chosen_and_devices_completed(
    loopctl: Loopctl, attached: tuple[str, Path], area: Path
) -> None:
    node, image = attached
    command = ("list", "-n", "-O", "name,owner,size,lifetime", "-j", image)
    assert loopctl.run(*command) == (0, f"{node}\t{USER}\t{MIB}\tuser\n", "")
    with terminal() as (keyboard, screen):
        environment = {"TERM": "xterm"}
        assert loopctl.run(*command, stdout=screen, environment=environment)[0] == 0
        assert os.read(keyboard, 4096).decode() == f"{node} {USER} 1M user\r\n"
        command = ("list", "-O", "size", "-j", image)
        assert loopctl.run(*command, "--bytes", stdout=screen, environment=environment)[0] == 0
        assert os.read(keyboard, 4096).decode() == f"\x1b[1m   SIZE\x1b[0m\r\n{MIB}\r\n"
    # Completion looks at the kernel only.
    assert node in bash("loopctl detach ", area)
    assert node.removeprefix("/dev/") in bash("loopctl set lo", area)
    assert node not in bash("loopctl attach ", area)


# --- set ----------------------------------------------------------------------------------------


def test_what_is_set_is_so_afterwards(loopctl: Loopctl, attached: tuple[str, Path]) -> None:
    node, image = attached
    change = "--direct-io=off --loop-ref mine --sector-size 4K --lifetime system --autoclear off"
    told = loopctl.json("set", image, *change.split())
    assert told == loopctl.json("show", node)
    assert (told["direct_io"], told["autoclear"]) == (False, False)
    assert (told["reference"], told["sector_size"], told["lifetime"]) == ("mine", 4096, "system")
    assert loopctl.run("set", node, "--loop-ref=", "--lifetime=user") == (0, "", "")
    shown = loopctl.json("show", node)
    assert (shown["reference"], shown["lifetime"]) == ("", "user")


def test_each_problem_has_its_sentence_and_exit_code(
    loopctl: Loopctl, attached: tuple[str, Path]
) -> None:
    node, _ = attached
    for command, code in (
        (f"set --sector-size 3 {node}", 2),
        (f"set --autoclear on {node}", 9),
        ("set --loop-ref x loop1048575", 5),
        (f"open --partition 7 {node} -- true", 125),
        (f"open {node} -- nowhere", 127),
    ):
        status, out, err = loopctl.run(*command.split())
        assert (status, out) == (code, ""), command
        assert one_sentence(err)


# --- open ---------------------------------------------------------------------------------------


def test_a_device_is_read_and_written_without_any_right_to_its_node(
    loopctl: Loopctl, attached: tuple[str, Path]
) -> None:
    node, image = attached
    script = 'head -c 512 <&$LOOPFD | sha256sum; [ -r "$LOOPDEV" ] || echo {}; exit 7'
    status, out, err = loopctl.run("open", node, "--", "sh", "-c", script)
    digest = subprocess.run(
        ["sha256sum"], input=pattern(0, 512), check=True, capture_output=True
    ).stdout.decode()
    assert (status, out, err) == (7, f"{digest}/dev/fd/3\n", "")
    write = ["sh", "-c", "echo written >&$LOOPFD && sync"]
    assert loopctl.run("open", node, "--", *write)[0] != 0
    assert loopctl.run("open", "-w", node, "--", *write)[0] == 0
    assert image.read_bytes()[:8] == b"written\n"


def test_a_partition_can_be_opened(world: World, logind: LogindDouble, loopctl: Loopctl) -> None:
    disk = make_gpt(world.new_path(), owner=USER)
    loopctl.json("attach", "-P", disk)
    command = ["sh", "-c", "wc -c <&$LOOPFD"]
    assert loopctl.run("open", "--partition", "2", disk, "--", *command) == (0, f"{MIB}\n", "")


def test_a_command_without_a_stdout_does_not_write_to_the_device(
    loopctl: Loopctl, attached: tuple[str, Path]
) -> None:
    """Closed streams: the device would be opened in its place."""
    node, image = attached
    before = image.read_bytes()
    status, _, err = loopctl.run(
        "open", "-w", node, "--", "echo", "hello", preexec_fn=lambda: os.close(1)
    )
    assert status != 0
    assert "write error" in err
    assert image.read_bytes() == before


def test_a_device_that_is_detached_meanwhile_goes_with_the_command(
    loopctl: Loopctl, attached: tuple[str, Path]
) -> None:
    node, _ = attached
    loop = look_at(number_of(node))
    assert loop is not None
    environment = {"SHELL": "/bin/sh"}
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "environment": environment}
    with loopctl.start("open", node, **streams) as running:  # a shell, without a command
        assert running.process.stdin is not None
        running.process.stdin.write(b"echo $LOOPFD\n")
        running.process.stdin.flush()
        assert running.line() == "3"
        status, _, err = loopctl.run("detach", node)
        assert status == 0
        assert "still in use" in err
        assert loop_is_bound(loop.number, loop.diskseq)
        status, out, err = running.end()  # at the end of its input
    assert (status, out) == (0, "")
    assert err == f"loopctl: somebody has detached {node}\n"
    wait_unbound(loop.number, loop.diskseq)


# --- partitions ---------------------------------------------------------------------------------


@pytest.fixture
def disk(world: World, logind: LogindDouble, loopctl: Loopctl) -> tuple[str, Path]:
    """A device of USER's with two partitions, and its file."""
    image = make_gpt(world.new_path(), owner=USER)
    return loopctl.json("attach", "-P", image)["node"], image


def test_a_partition_is_opened_by_its_node(
    world: World, loopctl: Loopctl, disk: tuple[str, Path]
) -> None:
    node, image = disk
    before = image.read_bytes()
    link = world.new_path()
    link.symlink_to(f"{node}p2")
    for target in (f"{node}p2", f"{node.removeprefix('/dev/')}p2", link):
        command = ["sh", "-c", "wc -c <&$LOOPFD; echo $LOOPDEV"]
        status, out, err = loopctl.run("open", target, "--", *command)
        assert (status, out, err) == (0, f"{MIB}\n{node}p2\n", "")
    write = ["sh", "-c", "echo written >&$LOOPFD && sync"]
    assert loopctl.run("open", "-w", f"{node}p2", "--", *write)[0] == 0
    after = image.read_bytes()
    assert after[2 * MIB :][:8] == b"written\n"
    assert after[: 2 * MIB] == before[: 2 * MIB]
    for arguments in ((f"{node}p7",), ("--partition", "1", f"{node}p1")):
        status, out, err = loopctl.run("open", *arguments, "--", "true")
        assert (status, out) == (125, "")
        assert one_sentence(err)


def test_a_partition_is_resized_by_its_node(loopctl: Loopctl, disk: tuple[str, Path]) -> None:
    node, _ = disk
    status, out, err = loopctl.run("resize", "--sizelimit", "512K", f"{node}p1")
    assert (status, out, err) == (0, f"{node}p1: 512 KiB (524288 bytes)\n", "")
    shown = loopctl.json("show", node)
    assert (shown["size"], shown["size_limit"]) == (4 * MIB, 0)
    assert [each["size"] for each in shown["partitions"]] == [MIB // 2, MIB]
    for option in ("--offset=0", "--force"):
        status, out, err = loopctl.run("resize", option, "--sizelimit=512K", f"{node}p1")
        assert (status, out) == (2, "")
        assert one_sentence(err)


def test_a_partition_is_shown(loopctl: Loopctl, disk: tuple[str, Path]) -> None:
    node, _ = disk
    told = loopctl.json("show", f"{node}p2")
    assert {name: told[name] for name in ("node", "number", "start", "size", "disk")} == {
        "node": f"{node}p2",
        "number": 2,
        "start": 2 * MIB,
        "size": MIB,
        "disk": node,
    }
    status, out, err = loopctl.run("show", f"{node}p2")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"Node:      {node}p2",
        f"Partition: 2 of {node}",
        "Start:     2 MiB (2097152 bytes)",
        "Size:      1 MiB (1048576 bytes)",
    ]
    status, out, err = loopctl.run("show", f"{node}p3")
    assert (status, out) == (5, "")
    assert f"{node} has no partition 3" in err


@pytest.mark.parametrize(
    "command", [["detach"], ["detach", "--lazy"], ["rescan"], ["set", "--loop-ref=name"]]
)
def test_what_is_for_all_of_a_device_is_not_done_to_a_partition(
    loopctl: Loopctl, disk: tuple[str, Path], command: list[str]
) -> None:
    node, _ = disk
    before = loopctl.json("show", node)
    status, out, err = loopctl.run(*command, f"{node}p1")
    assert (status, out) == (2, "")
    assert err == f"loopctl: {node}p1 is a partition: name the disk, {node}\n"
    assert loopctl.json("show", node) == before


def test_programs_are_told_what_an_fd_names(world: World, disk: tuple[str, Path]) -> None:
    node, image = disk
    with blocking.Client.connect(world.bus.address) as client:
        with ExitStack() as stack:
            whole, part, file = (os.open(path, os.O_PATH) for path in (node, f"{node}p2", image))
            for fd in (whole, part, file):
                stack.callback(os.close, fd)
            named = [client.named_by_fd(fd) for fd in (whole, part)]
            assert [(each.device.node, each.partition) for each in named] == [
                *((node, None), (node, 2))
            ]
            with pytest.raises(NoSuchDevice, match="another user"):
                client.named_by_fd(file)  # root is led to no user's device by a file
            assert client.device_by_fd(whole) is named[1].device
            for call in (client.device_by_fd, client.detach_by_fd):
                with pytest.raises(InvalidArgs, match="partition"):
                    call(part)
        assert loop_is_bound(number_of(node))


def test_a_rescan_tells_what_there_is_then(
    world: World, logind: LogindDouble, loopctl: Loopctl
) -> None:
    image = make_mbr(world.new_path(), ((2048, 2048),), owner=USER)
    node = loopctl.json("attach", image)["node"]
    assert loopctl.run("rescan", node) == (0, f"{node}p1\n", "")
    make_mbr(image, ((2048, 4096), (3000, 100), (8192, 100)), owner=USER)
    told = loopctl.run("rescan", image)
    assert told == (0, f"{node}p1\n{node}p3\n", f"loopctl: {_MISSING.format(node)}\n")
    assert loopctl.run("rescan", "-J", image)[1:] == (
        json.dumps(
            {
                "object": loopctl.json("show", node)["object"],
                "node": node,
                "partitions": [
                    {"number": 1, "node": f"{node}p1", "start": MIB, "size": 2 * MIB},
                    {"number": 3, "node": f"{node}p3", "start": 4 * MIB, "size": 51200},
                ],
                "missing_partitions": [2],
            }
        )
        + "\n",
        f"loopctl: {_MISSING.format(node)}\n",
    )


_MISSING = (
    "{} has no partition 2 of its table, which overlaps another or begins past the end; --offset "
    "and --sizelimit attach such a part of the file by itself"
)


@pytest.mark.parametrize("command", ["attach", "hold", "run"])
def test_who_attaches_is_told_what_is_missing(
    world: World, logind: LogindDouble, loopctl: Loopctl, command: str
) -> None:
    image = make_mbr(world.new_path(), ((2048, 2048), (3000, 100)), owner=USER)
    behind = ["--", "echo", "{}"] if command == "run" else []
    with loopctl.start(command, "-P", image, *behind) as running:
        node = running.line()
        if command == "hold":
            assert running.process.stderr is not None
            lines = [running.process.stderr.readline().decode() for _ in range(2)]
            assert lines[0] == f"loopctl: {_MISSING.format(node)}\n"
        else:
            assert running.end() == (0, "", f"loopctl: {_MISSING.format(node)}\n")


@pytest.mark.parametrize(
    ("size", "cut", "reason"),
    [
        (4096, 0, "is for sectors of 4096 bytes; -b 0 takes them"),
        (512, MIB, "cannot be read; the file may have been cut off"),
    ],
)
def test_who_finds_no_partitions_is_told_why(
    world: World, logind: LogindDouble, loopctl: Loopctl, size: int, cut: int, reason: str
) -> None:
    """shrink-backup#61: the header of a GPT has the disk's size, and is of no use without it."""
    image = make_gpt(world.new_path(), ((64, 64),), sector_size=size, owner=USER)
    os.truncate(image, 4 * MIB - cut)
    status, out, err = loopctl.run("attach", "-P", image)
    assert status == 0
    node = out.rstrip("\n")
    assert err == f"loopctl: {node} has no partitions: the table in the file {reason}\n"


# --- monitor ------------------------------------------------------------------------------------


def event(running: Running, path: str) -> dict[str, Any]:
    """The next that a monitor tells about a device, among those of others."""
    while True:
        told: dict[str, Any] = json.loads(running.line())
        if told["device"]["object"] == path:
            return told


def test_what_happens_is_told_as_it_does(
    world: World, logind: LogindDouble, loopctl: Loopctl
) -> None:
    image = world.image()
    with ExitStack() as stack:
        keyboard, screen = stack.enter_context(terminal())
        running = stack.enter_context(loopctl.start("monitor", "--json", stderr=screen))
        read_until(keyboard, "press Ctrl-C to stop")
        path = loopctl.json("attach", image)["object"]
        assert event(running, path)["event"] == "attached"
        os.truncate(image, 2 * MIB)
        loopctl.run("resize", image)
        told = event(running, path)
        assert (told["event"], told["changed"]) == ("changed", ["size"])
        assert told["device"]["size"] == 2 * MIB
        loopctl.run("detach", image)
        while (told := event(running, path))["event"] != "detached":
            assert "state" in told["changed"]
        assert told["device"]["backing_file"] == str(image)
        running.signal(signal.SIGINT)
        assert running.end()[0] == 0


def test_people_are_told_in_colours(world: World, logind: LogindDouble, loopctl: Loopctl) -> None:
    image = world.image()
    with terminal() as (keyboard, screen):
        streams: dict[str, Any] = {"stdout": screen, "stderr": screen}
        with loopctl.start("monitor", environment={"TERM": "xterm"}, **streams) as running:
            read_until(keyboard, "press Ctrl-C to stop")
            node = loopctl.run("attach", image)[1].rstrip()
            attached = f"\x1b[32mattached\x1b[0m {node:11} {image} (1 MiB, for {USER})"
            read_until(keyboard, re.escape(attached))
            running.signal(signal.SIGTERM)
            assert running.end()[0] == 0


# --- the bus, and other loopds ------------------------------------------------------------------


def test_a_client_that_lost_the_bus_is_told_what_is_left(
    world: World, logind: LogindDouble
) -> None:
    logind.users.add(os.getuid())
    with blocking.Client.connect(world.bus.address) as client:
        leased, held, kept = (client.attach(world.image()) for _ in range(3))
        hold = held.hold()
        kept.set_lifetime("user")
        stuck: socket.socket = client._client._link._connection._socket
        stuck.shutdown(socket.SHUT_RDWR)
        with pytest.raises(Disconnected):
            leased.properties()
        there, gone = client.reconnect()
        assert (there, gone) == ((held, kept), (leased,))
        assert kept.properties().lifetime == "user"
        wait_unbound(number_of(leased.node), leased.diskseq)
        with client.changes(held) as changes:
            hold.close()
            kinds = [change.kind for change in changes]
        assert kinds[-1] == "detached"
        assert kept.detach()
        assert client.reconnect() == ((), (held,))


def test_the_next_loopd_tells_what_has_become_of_the_devices_of_the_last(
    authority: object, make_daemon: Callable[..., Daemon], bus: Any, area: Path, package: Path
) -> None:
    """Without systemd only what is of the lifetime system outlives it."""
    runtime = area / "run"
    first = make_daemon(runtime_directory=runtime)
    world_images = [area / name for name in ("one", "two")]
    for each in world_images:
        each.write_bytes(bytes(MIB))
    with blocking.Client.connect(bus.address) as client:
        with client.changes() as changes:
            leased = client.attach(world_images[0])
            kept = client.attach(world_images[1], lifetime="system")
            told = iter(changes)
            mine = {leased.path: leased, kept.path: kept}
            assert _next(told, mine) == ("attached", leased)
            while (each := _next(told, mine)) != ("attached", kept):
                assert each[0] == "changed"
            first.kill()
            wait_unbound(number_of(leased.node), leased.diskseq)
            make_daemon(runtime_directory=runtime)
            while (each := _next(told, mine)) != ("detached", leased):
                assert each[0] == "changed"
            assert kept.properties().lifetime == "system"
            assert kept.detach()
            while (each := _next(told, mine)) != ("detached", kept):
                assert each == ("changed", kept)


def _next(told: Iterator[Any], mine: dict[str, blocking.Device]) -> tuple[str, blocking.Device]:
    """The next change of a device of ours."""
    while True:
        change = next(told)
        if change.device.path in mine:
            return change.kind, change.device


# --- polkit asks --------------------------------------------------------------------------------

_ASKED = r"AUTHENTICATING FOR org\.example\.loop1\.attach"

_IN_A_SYSTEM = """
mount -t tmpfs tmpfs /run
mkdir /run/dbus
ln -s "$1" /run/dbus/system_bus_socket
mount -t tmpfs tmpfs /etc/pam.d
printf 'auth sufficient pam_permit.so\\naccount sufficient pam_permit.so\\n' >/etc/pam.d/polkit-1
shift
exec setsid --ctty --wait setpriv --reuid="$1" --regid=nogroup --clear-groups -- "${@:2}"
"""


@pytest.fixture(scope="module")
def strict() -> Iterator[World]:
    """A world in which polkit asks for the administrator's password."""
    with make_world(authority=RULES_NONE) as made:
        yield made


@pytest.fixture
def asking(strict: World) -> Iterator[World]:
    with strict.test() as testing:
        yield testing


def at_terminal(world: World, package: Path, screen: int, *arguments: str | Path) -> Any:
    """loopctl on a terminal of USER's, in a system where PAM lets everyone in."""
    program = Loopctl(world.bus, package, world.files)
    inside = ("unshare", "--mount", "--propagation=private", "--", "bash", "-euc", _IN_A_SYSTEM)
    before = (*inside, "bash", str(world.bus.socket_path), USER)
    streams = {"stdin": screen, "stderr": screen}
    return program.start(*arguments, user="root", before=before, **streams)


def test_a_password_is_asked_for_in_the_terminal(asking: World, package: Path) -> None:
    """By an agent that has gone by the time that the command has the terminal."""
    command = ["sh", "-c", "cat /proc/$PPID/task/*/children"]
    with terminal() as (keyboard, screen):
        with at_terminal(asking, package, screen, "run", asking.image(), "--", *command) as running:
            status, out, _ = running.end()
            seen = read_until(keyboard, "AUTHENTICATION COMPLETE")
    assert status == 0, seen
    assert len(out.split()) == 1  # the command itself
    assert re.search(_ASKED, seen)


def test_a_question_is_given_up_by_ctrl_c_and_the_terminal_echoes_again(
    asking: World, package: Path
) -> None:
    program = Loopctl(asking.bus, package, asking.files)
    with terminal() as (keyboard, screen):
        before = termios.tcgetattr(screen)
        streams: dict[str, Any] = {"stdin": screen, "stderr": screen}
        command = ("hold", asking.image())
        with program.start(*command, before=("setsid", "--ctty", "--wait"), **streams) as running:
            read_until(keyboard, rf"{_ASKED}[^$]*Password: ")
            os.write(keyboard, b"\x03")
            assert running.end()[:2] == (128 + signal.SIGINT, "")
        assert termios.tcgetattr(screen) == before


@pytest.mark.parametrize("arguments", [["--no-ask-password"], []])
def test_nobody_is_asked_who_does_not_want_it_or_has_no_terminal(
    asking: World, package: Path, arguments: list[str]
) -> None:
    program = Loopctl(asking.bus, package, asking.files)
    with ExitStack() as stack:
        keyboard, screen = stack.enter_context(terminal())
        streams: dict[str, Any] = {"stderr": screen} | ({"stdin": screen} if arguments else {})
        command = ("hold", *arguments, asking.image())
        before = ("setsid", "--ctty", "--wait") if arguments else ()
        status, out, _ = program.run(*command, before=before, **streams)
        assert (status, out) == (4, "")
        seen = read_until(keyboard, r"loopctl:.*\n")
    assert not re.search(_ASKED, seen)
    assert ("--no-ask-password" in seen) is bool(arguments)
