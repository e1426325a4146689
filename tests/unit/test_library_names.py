# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names that the D-Bus libraries keep to themselves, and that loopd goes by all the same.

Transport rule 14 (private names): each is pinned here, so that a new release that changes one is
seen before anything else fails.
"""

import ast
import subprocess
import sys

import pytest

from tests.harness.area import CHECKOUT

LIBRARIES = ("dbus_next", "dbus_fast")
both = pytest.mark.parametrize("library", LIBRARIES)

USED = {"_cache", "_marshall", "_private"}
"""All of them; a test for each is below."""

CALL = """
from {library} import Message, MessageType, Variant
call = Message(destination="a.b", path="/c", interface="d.e", member="F", signature="sh",
    body=["text", 0], serial=5, unix_fds=[7])
"""


def run(library: str, body: str) -> str:
    """Run Python with this library, and return what it prints."""
    program = (CALL + body).replace("{library}", library)
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_other_private_name_is_used() -> None:
    """Transport rule 14 (private names): this list is whole."""
    tree = ast.parse((CHECKOUT / "loopd" / "bus" / "codec.py").read_text())
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        found |= {name for name in names if name.startswith("_") and not name.startswith("__")}
    assert found == USED


@both
def test_a_message_marshals_itself_with_its_fds_counted(library: str) -> None:
    """Transport rule 14 (private names): Message._marshall(True)."""
    told = run(library, "print(call._marshall(True).hex())")
    data = bytes.fromhex(told)
    # The field UNIX_FDS, of one fd.
    assert b"\x09\x01u\0\x01\0\0\0" in data
    assert data[:4] == b"l\x01\0\x01"
    assert data.endswith(b"text\0\0\0\0" + bytes(4))


@both
def test_the_unmarshaller_reads_one_message_from_a_file(library: str) -> None:
    """Transport rule 14 (private names): _private.unmarshaller.Unmarshaller."""
    body = """
import io
from {library}._private.unmarshaller import Unmarshaller
data = bytes(call._marshall(True))
back = Unmarshaller(io.BytesIO(data + data)).unmarshall()
print(back.member, back.body, back.signature, back.serial)
print(back.message_type == MessageType.METHOD_CALL)
"""
    assert run(library, body) == "F ['text', 0] sh 5\nTrue"


@both
def test_the_unmarshaller_does_not_take_half_a_message_for_a_whole_one(library: str) -> None:
    """Transport rule 14 (private names): it says None, or raises."""
    body = """
import io
from {library}._private.unmarshaller import Unmarshaller
data = bytes(call._marshall(True))
for length in (0, 10, 16, 60, len(data) - 1):
    try:
        print(Unmarshaller(io.BytesIO(data[:length])).unmarshall())
    except Exception:
        print(None)
"""
    assert run(library, body).split() == ["None"] * 5


def test_dbus_next_keeps_every_signature_in_a_dictionary() -> None:
    """Transport rule 14 (private names): SignatureTree._cache of dbus-next."""
    body = """
from dbus_next.signature import SignatureTree
SignatureTree._cache.clear()
from dbus_next._private.unmarshaller import Unmarshaller
import io
Unmarshaller(io.BytesIO(bytes(call._marshall(True)))).unmarshall()
print(type(SignatureTree._cache).__name__, "sh" in SignatureTree._cache)
SignatureTree._cache.clear()
print(len(SignatureTree._cache))
"""
    assert run("dbus_next", body) == "dict True\n0"


def test_dbus_fast_keeps_signatures_in_a_cache_of_functools() -> None:
    """Transport rule 14 (private names): get_signature_tree of dbus-fast, and how it is cached."""
    body = """
from dbus_fast.signature import get_signature_tree
get_signature_tree.cache_clear()
print([each.signature for each in get_signature_tree("ha{sv}").types])
print(get_signature_tree.cache_info().currsize)
get_signature_tree.cache_clear()
print(get_signature_tree.cache_info().currsize)
"""
    assert run("dbus_fast", body) == "['h', 'a{sv}']\n1\n0"


def test_dbus_fast_tells_its_version() -> None:
    """Transport rule 14 (private names): __version__.__version__ of dbus-fast."""
    told = run("dbus_fast", "from dbus_fast.__version__ import __version__; print(__version__)")
    assert int(told.split(".")[0]) >= 5
