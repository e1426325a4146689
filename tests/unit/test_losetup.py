# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who knows losetup and types its options: loopctl does what they mean, or says what does it."""

import pytest

from loopd.cli import app, columns
from loopd.cli.arguments import parse
from loopd.cli.outcome import ExitCode


def meaning(line: str) -> dict[str, object]:
    """What a command line asks for, without what it does not say."""
    found = vars(parse(line.split()))
    return {key: value for key, value in found.items() if key != "parser"}


@pytest.mark.parametrize(
    ("losetup", "loopctl"),
    [
        ("-f f", "attach f"),
        ("--find f", "attach f"),
        ("-f --show f", "attach f"),
        ("--show -f f", "attach f"),
        ("-fP --show f", "attach -P f"),
        ("-Pf --show f", "attach -P f"),
        ("-rf f", "attach -r f"),
        ("-fo1M f", "attach -o 1M f"),
        ("-f --offset=1M --sizelimit 1.5M f", "attach -o 1M --sizelimit 1.5M f"),
        ("-f -b 4096 f", "attach -b 4096 f"),
        ("-f --direct-io f", "attach --direct-io f"),
        ("-f --direct-io=off f", "attach --direct-io=off f"),
        ("-f --loop-ref x f", "attach --loop-ref x f"),
        ("-f -L f", "attach f"),
        ("-f --nooverlap f", "attach f"),
        ("-f -- -odd", "attach -- -odd"),
        ("-d /dev/loop3", "detach /dev/loop3"),
        ("-d /dev/loop3 /dev/loop4", "detach /dev/loop3 /dev/loop4"),
        ("--detach=/dev/loop3", "detach /dev/loop3"),
        ("-c /dev/loop3", "resize /dev/loop3"),
        ("--set-capacity /dev/loop3", "resize /dev/loop3"),
        ("-a", "list"),
        ("-l", "list"),
        ("-la", "list"),
        ("-l /dev/loop3", "list /dev/loop3"),
        ("/dev/loop3", "list /dev/loop3"),
        ("loop3", "list loop3"),
        ("-j f", "list -j f"),
        ("-j f -o 512", "list -j f -o 512"),
        ("-nO NAME -j f", "list -n -O NAME -j f"),
        ("-O NAME,BACK-FILE", "list -O NAME,BACK-FILE"),
        ("--output-all --raw", "list --output-all --raw"),
        ("-J", "list -J"),
        ("-J -l /dev/loop3", "list -J /dev/loop3"),
        ("--direct-io=off /dev/loop3", "set --direct-io=off /dev/loop3"),
        ("-b 4096 /dev/loop3", "set -b 4096 /dev/loop3"),
        ("attach -f --show f", "attach f"),
        ("attach -fP -L f", "attach -P f"),
        ("hold --nooverlap f", "hold f"),
        ("list -a", "list"),
        ("list -l loop3", "list loop3"),
        ("detach -d loop3 loop4", "detach loop3 loop4"),
        ("resize -c loop3", "resize loop3"),
    ],
)
def test_what_losetup_takes_means_the_same(losetup: str, loopctl: str) -> None:
    assert meaning(loopctl).items() <= meaning(losetup).items()


@pytest.mark.parametrize(
    ("line", "spelling"),
    [
        ("-f", "'loopctl attach FILE' prints its node"),
        ("-D", "'loopctl detach --all'"),
        ("--detach-all", "'loopctl detach --all'"),
        ("-fv f", "'loopctl show DEVICE'"),
        ("--remove loop3", "'loopctl detach DEVICE'"),
        ("-e aes /dev/loop3 f", "'cryptsetup open'"),
        ("/dev/loop3 f", "'loopctl attach FILE'"),
        ("/dev/loop3 f", "--number 3"),
        ("-r -o 512 /dev/loop3 f", "'loopctl attach FILE'"),
        ("-o 512", "'loopctl attach FILE'"),
        ("-J list", "'loopctl list -J'"),
        ("--no-ask-password attach f", "--no-ask-password"),
        ("-d", "-d requires"),
        ("-Z", "-Z"),
        ("-d loop3 -P", "-P"),
        ("list -j f loop3", "--associated FILE"),
        ("list -o 512", "--associated FILE"),
    ],
)
def test_what_loopctl_does_otherwise_is_one_sentence(
    capsys: pytest.CaptureFixture[str], line: str, spelling: str
) -> None:
    assert app.main(line.split()) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("loopctl: ")
    assert spelling in err


def test_of_contradictions_the_last_counts() -> None:
    assert parse("attach --allow-overlap -L f".split()).allow_overlap is False
    assert parse("attach -L --allow-overlap f".split()).allow_overlap is True
    assert parse("attach f".split()).allow_overlap is False


def test_raw_lines_split_at_each_space() -> None:
    rows = [["NAME", "BACK-FILE"], ["/dev/loop3", "/tmp/my  disk.img (deleted)"]]
    lines = columns.raw(rows)
    assert lines == ["NAME BACK-FILE", "/dev/loop3 /tmp/my\\x20\\x20disk.img\\x20(deleted)"]
    assert [len(line.split(" ")) for line in lines] == [2, 2]
