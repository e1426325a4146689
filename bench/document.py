# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.document RESULTS.json`: puts results into docs/performance.md."""

import re
import sys
from pathlib import Path

from bench.chart import drawn
from bench.results import Result, loaded

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "performance.md"
PICTURE = DOCS / "performance.svg"
CAPTION = "Attach and detach: dots and numbers are medians, lines lead to the 99th percentile"
_PLACE = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Fill the page in, as far as there are results."""
    results, machine = loaded(Path(sys.argv[1]).read_text())
    PAGE.write_text(filled(PAGE.read_text(), results, machine))
    if "pairs" in results:
        PICTURE.write_text(picture(results["pairs"]))


def filled(page: str, results: dict[str, Result], machine: dict[str, str]) -> str:
    """The page with the tables of these results, and as it was elsewhere."""

    def fill(place: re.Match[str]) -> str:
        begin, name, end = place.groups()
        if name == "machine":
            text = ", ".join(f"{what}: {value}" for what, value in machine.items())
            return f"{begin}{text[0].upper()}{text[1:]}.\n{end}"
        if name not in results:
            return place[0]
        drawing = f"![{CAPTION}]({PICTURE.name})\n\n" if name == "pairs" else ""
        return f"{begin}{drawing}{results[name].title}:\n\n{results[name].markdown()}\n{end}"

    return _PLACE.sub(fill, page)


def picture(pairs: Result) -> str:
    """What a pair costs by each way."""
    median, worst = pairs.columns.index("pair"), pairs.columns.index("pair p99")
    times = {
        name: (float(row[median] or 0), float(row[worst] or 0)) for name, row in pairs.rows.items()
    }
    return drawn(CAPTION, times, "loopd,")


if __name__ == "__main__":
    main()
