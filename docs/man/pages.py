# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the manual pages, below a directory, from the .rst files beside this one: `pages.py DIR`.

What is said elsewhere is not said again: org.example.Loop1(5) takes the interfaces from dbus/, the
errors from loopd/errors.py and the actions from polkit/. It needs Docutils (python3-docutils).
"""

import inspect
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

SOURCES = Path(__file__).resolve().parent
CHECKOUT = SOURCES.parents[1]

# This checkout's, of which nothing is compiled here.
sys.path.insert(0, str(CHECKOUT))
sys.dont_write_bytecode = True

from loopd import errors  # noqa: E402

_OURS = "org.example.Loop1"
_DOC = "org.gtk.GDBus.DocString"
_CHANGES = "org.freedesktop.DBus.Property.EmitsChangedSignal"
_IMPLY = "org.freedesktop.policykit.imply"
_NOTHING = "None yet."
_OPTION = re.compile(r"(?:^|(?<=[.;] ))([a-z]+(?:-[a-z]+)*) ([a-z]): ")
_ANSWERS = {
    "yes": "yes",
    "auth_admin": "an administrator's password",
    "auth_admin_keep": "an administrator's password, for a while",
}


def main() -> int:
    """Make all pages; the exit status."""
    try:
        from docutils.core import publish_string
    except ImportError:
        print("the manual pages need Docutils (Debian: python3-docutils)", file=sys.stderr)
        return 1
    settings = {"halt_level": 2, "report_level": 2, "input_encoding": "utf-8"}
    for path in sorted(SOURCES.glob("*.rst")):
        page = publish_string(
            filled(path.read_text()),
            source_path=str(path),
            writer_name="manpage",
            settings_overrides=settings,
        )
        directory = Path(sys.argv[1], f"man{path.stem[-1]}")
        directory.mkdir(parents=True, exist_ok=True)
        # No gaps between words, and no hyphens in names that people copy.
        text = re.sub(r"^\.TH .*$", r"\g<0>\n.nh\n.ad l", page.decode(), count=1, flags=re.M)
        text = re.sub(r"[^\x00-\x7f]", lambda match: f"\\[u{ord(match[0]):04X}]", text)
        (directory / path.stem).write_text(text)
    return 0


def filled(page: str) -> str:
    """A page with what its remarks ask for, such as `.. the errors`."""
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "interfaces": interfaces,
        "errors": all_errors,
        "actions": actions,
    }
    return re.sub(r"^\.\. the (\w+)$", lambda match: "\n".join(parts[match[1]]()), page, flags=re.M)


def interfaces() -> Iterator[str]:
    """Our interfaces, a section for each; who knows D-Bus knows the others."""
    for interface in ElementTree.parse(CHECKOUT / "dbus" / f"{_OURS}.xml").iter("interface"):
        name = interface.get("name", "")
        if name.startswith(_OURS):
            title = f"INTERFACE {name}"
            yield f"{title}\n{'=' * len(title)}\n\n{doc(interface)}\n"
            yield "Methods\n-------\n"
            for method in interface.iter("method"):
                yield from a_method(method)
            yield "Properties\n----------\n"
            for each in interface.iter("property"):
                # "const" is what never changes.
                const = " (const)" if annotation(each, _CHANGES) == "const" else ""
                yield f"**{each.get('name')}** {each.get('type')}{const}\n  {doc(each)}\n"


def a_method(method: Element) -> Iterator[str]:
    """One method: how it is called, what it does, and its arguments, if more is said of them."""
    taken, given = (
        [arg for arg in method.iter("arg") if arg.get("direction") == way] for way in ("in", "out")
    )
    answer = f" → {signature(given)}" if given else ""
    yield f"**{method.get('name')}**\\ ({signature(taken)}){answer}\n  {doc(method)}\n"
    for arg in (*taken, *given):
        text = doc(arg)
        if not text or text == _NOTHING:
            continue
        before, *options = _OPTION.split(text)
        if not options:
            yield f"  *{arg.get('name')}*: {text}\n"
            continue
        assert not before
        yield f"  *{arg.get('name')}*:\n"
        for key, kind, meaning in zip(*[iter(options)] * 3, strict=True):
            yield f"    **{key}** {kind}\n      {meaning.strip()}\n"


def signature(arguments: list[Element]) -> str:
    """Arguments by type and name."""
    return ", ".join(f"{each.get('type')} *{each.get('name')}*" for each in arguments)


def all_errors() -> Iterator[str]:
    """Each error that has a name of its own, and what it means."""
    for cls in errors.LoopError.__subclasses__():
        if name := getattr(cls, "dbus_name", None):
            yield f"**{name}**\n  {escaped(inspect.getdoc(cls) or '')}\n"


def actions() -> Iterator[str]:
    """Each action: what polkit says it is for, and what it answers to whom."""
    policy = ElementTree.parse(CHECKOUT / "polkit" / "org.example.loop1.policy")
    for action in policy.iter("action"):
        active, inactive, others = (
            _ANSWERS[action.findtext(f"defaults/allow_{who}") or ""]
            for who in ("active", "inactive", "any")
        )
        assert inactive == others
        same = active == others
        answers = active if same else f"in an active local session {active}, else {others}"
        implied = action.findtext(f"annotate[@key='{_IMPLY}']")
        yield f"**{action.get('id')}**"
        yield f"  {escaped(action.findtext('description') or '')}. By default: {answers}."
        yield f"  A yes to it is also a yes to **{implied}**.\n" if implied else ""


def annotation(element: Element, name: str) -> str:
    """What an annotation of an element says; empty if there is none."""
    found = element.find(f"annotation[@name='{name}']")
    return found.get("value", "") if found is not None else ""


def doc(element: Element) -> str:
    """What the description says of an element."""
    return escaped(annotation(element, _DOC))


def escaped(text: str) -> str:
    """Text without markup."""
    return re.sub(r"([*`|\\]|_\b)", r"\\\1", text)


if __name__ == "__main__":
    sys.exit(main())
