# SPDX-License-Identifier: LGPL-2.1-or-later
"""losetup's command lines: which command of loopctl's each of them means.

losetup has options where loopctl has commands. The rest of its options are those of the commands,
which `arguments` reads. An option is written as losetup has it, with an equals sign if a value
follows.
"""

import getopt
from collections.abc import Collection, Sequence

# What losetup is told to do, and the command that does it; the first that is found counts.
_COMMANDS = {
    "-f --find": "attach",
    "-d= --detach=": "detach",
    "-c= --set-capacity=": "resize",
    "-j= --associated=": "list",
    "-a --all": "list",
    "-l --list": "list",
    "-O= --output=": "list",
    "--output-all": "list",
    "-n --noheadings": "list",
    "--raw": "list",
    "-J --json": "list",
}

# How losetup is to do that: the commands take the same.
_HOW = (
    *("-o= --offset=", "--sizelimit=", "-r --read-only", "-P --partscan", "--show"),
    *("-L --nooverlap", "-b= --sector-size=", "--direct-io=", "--loop-ref="),
)

# With a device alone, these change how it is.
_CHANGES = {"-b", "--sector-size", "--direct-io", "--loop-ref"}

_REFUSED = {
    "-D --detach-all": "-D would detach the devices of others, too: 'loopctl detach --all' "
    "detaches your own",
    "-v --verbose": "loopctl has no -v: 'loopctl show DEVICE' tells all about a device",
    "--remove=": "loopd itself removes what it does not need: 'loopctl detach DEVICE' is enough",
    "-e= --encryption=": "the loop driver encrypts nothing: put 'cryptsetup open' on the device "
    "that 'loopctl attach FILE' prints",
}

DONE_ANYWAY = {
    "attach": ("-f --find", "--show"),
    "detach": ("-d --detach",),
    "resize": ("-c --set-capacity",),
    "list": ("-a --all", "-l --list"),
}
"""What a command does without being told, so that it takes these for nothing."""


class Refused(Exception):
    """A sentence: why loopctl does not do that, and what does it."""


def translated(given: Sequence[str], commands: Collection[str]) -> list[str]:
    """A command line of losetup's, with the command of loopctl's that it means in front.

    `commands` are all that there are. Raises Refused.
    """
    named = " ".join((*_COMMANDS, *_HOW, *_REFUSED)).split()
    short = "".join(each[1:].replace("=", ":") for each in named if not each.startswith("--"))
    long = [each[2:] for each in named if each.startswith("--")]
    try:
        options, operands = getopt.gnu_getopt(list(given), short, long)
    except getopt.GetoptError as exc:
        raise Refused(exc.msg) from exc
    if operands and operands[0] in commands:
        raise Refused(f"the options follow the command: 'loopctl {operands[0]} {given[0]}'")
    names = {name for name, _ in options}
    for option, reason in _REFUSED.items():
        if names & _names(option):
            raise Refused(reason)
    found = [command for option, command in _COMMANDS.items() if names & _names(option)]
    command = found[0] if found else _command_for(operands, names)
    if command == "attach" and not operands:
        raise Refused(
            "loopd finds the free device when it attaches: 'loopctl attach FILE' prints its node"
        )
    words = [word for name, value in options for word in (name, value) if word]
    return [command, *words, "--", *operands]


def _command_for(operands: Sequence[str], names: Collection[str]) -> str:
    """What losetup does without being told: it sets up a device, changes one, or tells of it."""
    if not operands:
        raise Refused("what is to be done is missing: 'loopctl attach FILE' attaches a file")
    if len(operands) > 1:
        raise Refused(
            "loopd chooses the device: 'loopctl attach FILE' prints its node; 'loopctl attach "
            "--number 3 FILE' is for /dev/loop3, and takes the right to manage others' devices"
        )
    return "set" if _CHANGES & set(names) else "list"


def _names(option: str) -> set[str]:
    return set(option.replace("=", "").split())
