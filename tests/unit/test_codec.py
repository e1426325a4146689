# SPDX-License-Identifier: LGPL-2.1-or-later
"""The codec under either D-Bus library: the private names it uses, and what it promises of both."""

import subprocess
import sys

import pytest

LIBRARIES = ("dbus_next", "dbus_fast")


def under(library: str, body: str) -> str:
    """Run Python where only this library can be imported, and return what it prints."""
    hidden = next(name for name in LIBRARIES if name != library)
    program = f"import sys; sys.modules['{hidden}'] = None\nfrom loopd.bus import codec\n{body}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_library_that_is_there_is_used(library: str) -> None:
    assert under(library, "print(codec.LIBRARY)") == library


def test_the_faster_one_is_preferred() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from loopd.bus import codec; print(codec.LIBRARY)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "dbus_fast"


def test_an_old_dbus_fast_is_treated_as_absent() -> None:
    program = (
        "import sys, types\n"
        "import dbus_fast.__version__ as version\n"
        "version.__version__ = '1.84.2'\n"
        "from loopd.bus import codec; print(codec.LIBRARY)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "dbus_next"


def test_a_message_comes_back_as_it_was(library: str) -> None:
    body = """
message = codec.method_call("a.b", "/c", "d.e", "F", "sa{sv}ayt", ["x", {"k": codec.Variant("t",
    2**63)}, b"\\xff\\0", 7], serial=5, interactive=True)
back = codec.parse(codec.serialize(message))
print(back.member, back.signature, back.serial, back.body[0], back.body[1]["k"].value,
    back.body[1]["k"].signature, bytes(back.body[2]), back.body[3], int(back.flags))
"""
    assert under(library, body) == "F sa{sv}ayt 5 x 9223372036854775808 t b'\\xff\\x00' 7 4"


def test_a_handle_stays_the_index_it_is_on_the_wire(library: str) -> None:
    body = """
message = codec.method_call("a.b", "/c", "d.e", "F", "hv", [1, codec.Variant("h", 0)], serial=5,
    fds=[8, 9])
back = codec.parse(codec.serialize(message))
print(back.body[0], back.body[1].value, list(back.unix_fds))
"""
    assert under(library, body) == "1 0 []"


@pytest.mark.parametrize(
    "damage",
    [
        *(
            "data[:20]",
            "data[:-3]",
            "b'l' + data[1:4] + b'\\xff' * 8 + data[12:]",
            "b'x' + data[1:]",
        ),
        "data[:4] + bytes(4) + data[8:-9]",  # no body, although the signature has a string
    ],
)
def test_what_cannot_be_read_is_one_error(library: str, damage: str) -> None:
    body = f"""
data = codec.serialize(codec.method_call("a.b", "/c", "d.e", "F", "s", ["text"], serial=5))
try:
    codec.parse({damage})
except codec.MalformedMessage:
    print("malformed")
"""
    assert under(library, body) == "malformed"


def test_the_cache_of_signatures_is_bounded(library: str) -> None:
    """Transport rule 11 (signature cache)."""
    body = """
import itertools
for kinds in itertools.product("ybnqiuxtds", repeat=3):
    body = [1.0 if kind == "d" else "" if kind == "s" else 0 for kind in kinds]
    data = codec.serialize(codec.method_call("a.b", "/c", "d.e", "F", "".join(kinds),
        [False if kind == "b" else value for kind, value in zip(kinds, body)], serial=5))
    codec.parse(data)
    highest = max(locals().get("highest", 0), codec._signatures_cached())
print(highest)
"""
    highest = int(under(library, body))
    assert 200 < highest < 300


def test_argument_types_are_complete_types(library: str) -> None:
    assert under(library, "print(codec.argument_types('ha{sv}s(ii)'))") == (
        "['h', 'a{sv}', 's', '(ii)']"
    )


def test_an_array_of_marshalled_elements_is_what_the_library_makes_of_it(library: str) -> None:
    """Within the limits: an answer that is kept in parts is the answer."""
    body = """
V = codec.Variant
objects = [{f"/{'x' * n}": {"a.b": {"S": V("s", "y" * (n % 5)), "P": V("a(ustt)", [[1, "z", 2, n]]),
    "B": V("ay", bytes(n % 9)), "T": V("t", n)}}} for n in range(20)]
rows = [[[f"/{'x' * n}", "n", n, bytes(n % 9), n, "z" * (n % 7)]] for n in range(20)]
def reply(signature, body):
    return codec.serialize(codec.method_return(":1.7", 9, signature, [body], serial=3))
for signature, arrays, join in (
    ("a{oa{sa{sv}}}", objects, lambda each: {k: v for d in each for k, v in d.items()}),
    ("a(ostayus)", rows, lambda each: [row for rows in each for row in rows]),
):
    for count in (0, 1, 2, 20):
        kept = codec.Array(signature, [codec.element(signature, a) for a in arrays[:count]])
        whole = join(arrays[:count])
        assert reply(signature, kept) == reply(signature, whole), (signature, count)
        assert not count or codec.parse(reply(signature, kept)).body[0], (signature, count)
print("same")
"""
    assert under(library, body) == "same"
