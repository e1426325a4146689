# SPDX-License-Identifier: LGPL-2.1-or-later
"""A picture of times on a logarithmic scale, as SVG: a dot for each median, a line to the p99."""

import math
from xml.sax.saxutils import escape

from bench.results import number

ROW, LEFT, RIGHT, WIDTH, TOP, BOTTOM = 26, 190, 70, 760, 42, 34
# Read on white as on black.
_STYLE = (
    "text{font:13px sans-serif;fill:#777}.name{fill:#888}.grid{stroke:#8884}"
    ".line{stroke-width:2}.ours{stroke:#1a7f5a;fill:#1a7f5a}.others{stroke:#888;fill:#888}"
)


def drawn(title: str, times: dict[str, tuple[float, float]], ours: str) -> str:
    """The picture of medians and 99th percentiles in ms; what begins with `ours` stands out."""
    least = 10 ** math.floor(math.log10(min(median for median, _ in times.values())))
    most = 10 ** math.ceil(math.log10(max(worst for _, worst in times.values())))
    height = TOP + ROW * len(times) + BOTTOM

    def x(value: float) -> float:
        share = math.log(max(value, least) / least) / math.log(most / least)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    bottom = height - BOTTOM
    lines = [
        "<!-- SPDX-License-Identifier: LGPL-2.1-or-later -->",
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text x="{LEFT}" y="18">{escape(title)}</text>',
    ]
    tick = least
    while tick <= most:
        lines.append(f'<path class="grid" d="M{x(tick)} {TOP - 8}V{bottom}"/>')
        lines.append(
            f'<text x="{x(tick)}" y="{bottom + 18}" text-anchor="middle">{tick:g} ms</text>'
        )
        tick *= 10
    for row, (name, (median, worst)) in enumerate(times.items()):
        y = TOP + ROW * row + ROW // 2
        kind = "ours" if name.startswith(ours) else "others"
        lines += [
            f'<text class="name" x="{LEFT - 12}" y="{y + 4}" text-anchor="end">',
            f"{escape(name)}</text>",
            f'<path class="line {kind}" d="M{x(median)} {y}H{x(worst)}"/>',
            f'<circle class="{kind}" cx="{x(median)}" cy="{y}" r="4.5"/>',
            f'<text x="{x(worst) + 8}" y="{y + 4}">{number(median)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
