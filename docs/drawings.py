"""Draw the figures of the concept pages: `python docs/drawings.py` writes docs/images/concept-*.svg.

Lines and text have the colour of the text around them: the site puts the SVG into the page, and where a reader shows
the file as an image, it follows the system's light or dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN = "#4c84c4", "#d9772b", "#4f9d69"
SYSTEM = "<style>svg { color: #222 } @media (prefers-color-scheme: dark) { svg { color: #ddd } }</style>"
"""For the file alone: a page gives its own colour."""
ARROW = (
    '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 8 4 0 8z" fill="context-stroke"/></marker>'
)


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Return a figure of `parts` with an accessible title, without blank lines, as Markdown takes HTML."""
    head = f'<svg class="figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    font = 'font-family="system-ui, sans-serif" font-size="14" fill="currentColor" stroke-width="1.6"'
    body = "\n".join(parts)
    return f"{head} {font}>\n<title>{escape(title)}</title>\n<defs>{ARROW}</defs>\n{body}\n</svg>\n"


def text(
    x: float, y: float, words: str, *, anchor: str = "middle", size: int = 14, colour: str = "currentColor"
) -> str:
    """Return text whose baseline is at y."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, words: str = "", *, colour: str = BLUE, size: int = 14) -> str:
    """Return a box with its text in the middle."""
    at = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
    shape = f'<rect {at} fill="{colour}" fill-opacity=".18" stroke="{colour}"/>'
    return shape + text(x + width / 2, y + height / 2 + size * 0.35, words, size=size)


def line(*points: tuple[float, float], colour: str = "currentColor", arrow: bool = True, dashed: bool = False) -> str:
    """Return a line through the points."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    ends = ' marker-end="url(#arrow)"' * arrow + ' stroke-dasharray="5 4"' * dashed
    return f'<polyline points="{path}" fill="none" stroke="{colour}"{ends}/>'


def plus(x: float, y: float) -> str:
    """Return the sign of an addition."""
    circle = f'<circle cx="{x:g}" cy="{y:g}" r="8" fill="none" stroke="currentColor"/>'
    return circle + line((x - 4, y), (x + 4, y), arrow=False) + line((x, y - 4), (x, y + 4), arrow=False)


def streams() -> str:
    """Return one residual add above, and the same branch between four streams below."""
    parts = [text(20, 24, "residual: x + F(x)", anchor="start", size=15)]
    parts += [line((60, 110), (392, 110)), plus(400, 110), line((408, 110), (690, 110)), text(46, 115, "x")]
    parts += [line((140, 110), (140, 60), (220, 60)), box(220, 42, 110, 36, "F", colour=ORANGE)]
    parts += [line((330, 60), (400, 60), (400, 102))]
    parts += [text(20, 168, "four streams: X' = H X + post F(pre X)", anchor="start", size=15)]
    rows = [280, 310, 340, 370]
    for y in rows:
        parts += [line((60, y), (450, y)), line((530, y), (612, y)), plus(620, y), line((628, y), (690, y))]
        parts += [
            f'<circle cx="130" cy="{y}" r="4" fill="{BLUE}"/>',
            line((575, y - 17), (620, y - 17), (620, y - 9), colour=GREEN),
        ]
    parts += [line((130, rows[-1]), (130, 210), (190, 210), colour=BLUE), text(108, 246, "pre", colour=BLUE)]
    parts += [text(160, 202, "h", colour=BLUE), box(190, 192, 110, 36, "F", colour=ORANGE)]
    parts += [line((300, 210), (575, 210), (575, rows[-1] - 17), colour=GREEN, arrow=False)]
    parts += [text(320, 202, "y", colour=GREEN), text(600, 246, "post", colour=GREEN)]
    parts += [box(450, 262, 80, 126, "H", size=18), text(40, 330, "X"), text(708, 330, "X'")]
    parts += [text(490, 408, "mixes the streams", size=12)]
    return svg(740, 425, "A residual add, and a site of four streams", parts)


def boundary() -> str:
    """Return what lies between two branches, which is one kernel."""
    parts = [box(20, 60, 90, 44, "F of site k", colour=ORANGE, size=13), line((110, 82), (190, 82), colour=GREEN)]
    parts += [text(150, 74, "y", colour=GREEN)]
    frame = 'fill="none" stroke="currentColor" stroke-dasharray="6 4"'
    parts += [f'<rect x="160" y="24" width="430" height="196" rx="10" {frame}/>']
    parts += [text(375, 44, "one kernel: a boundary", size=13)]
    parts += [box(190, 60, 110, 44, "distribute"), text(245, 122, "H X + post y", size=12)]
    parts += [box(325, 150, 110, 44, "coefficients"), text(380, 211, "the next pre, post, H", size=12)]
    parts += [box(460, 60, 100, 44, "aggregate"), text(510, 122, "pre X'", size=12)]
    parts += [
        line((300, 82), (460, 82)),
        text(380, 74, "X'"),
        line((380, 82), (380, 150)),
        line((435, 172), (510, 172), (510, 128)),
    ]
    parts += [line((560, 82), (640, 82), colour=BLUE), text(612, 74, "h", colour=BLUE)]
    parts += [box(640, 60, 90, 44, "F of site k + 1", colour=ORANGE, size=12)]
    parts += [line((40, 250), (245, 250), (245, 128)), text(28, 255, "X")]
    parts += [line((312, 82), (312, 250), (730, 250)), text(716, 242, "X'")]
    parts += [text(20, 290, "read once: X, y, the projection", anchor="start", size=13)]
    parts += [text(446, 290, "written once: X', h, the coefficients", anchor="start", size=13)]
    return svg(750, 305, "A boundary: the end of one site and the beginning of the next", parts)


def matrix(x: float, y: float, rows: Sequence[Sequence[float]]) -> list[str]:
    """Return a matrix with the sums of its rows and columns beside it."""
    parts = []
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            at = f'x="{x + 46 * j:g}" y="{y + 40 * i:g}" width="44" height="38"'
            parts.append(f'<rect {at} fill="{BLUE}" fill-opacity="{value:.2f}" stroke="{BLUE}" stroke-opacity=".5"/>')
            parts.append(text(x + 46 * j + 22, y + 40 * i + 24, f"{value:.2f}", size=12))
        parts.append(text(x + 46 * len(row) + 24, y + 40 * i + 24, f"{sum(row):.2f}", size=12, colour=GREEN))
    for j, column in enumerate(zip(*rows, strict=True)):
        parts.append(text(x + 46 * j + 22, y + 40 * len(rows) + 18, f"{sum(column):.2f}", size=12, colour=GREEN))
    return parts


def gains() -> str:
    """Return a doubly stochastic matrix, and the gains of products of random matrices with and without the manifold."""
    import math

    import torch

    from mhc_compile.kernels.reference import mixing_matrix
    from mhc_compile.kernels.spec import Manifold, StreamSpec

    def matrices(manifold: Manifold, deviation: float, count: int) -> torch.Tensor:
        spec, random = StreamSpec(manifold=manifold), torch.Generator().manual_seed(0)
        logits = deviation * torch.randn(count, 64, spec.mix_rows, generator=random, dtype=torch.float64)
        if manifold == "unconstrained":
            logits = logits + torch.eye(4, dtype=torch.float64).flatten()
        return mixing_matrix(logits, spec)

    left, bottom, width, height, sites = 400, 240, 300, 190, 96
    parts = [
        text(20, 28, "a doubly stochastic H", anchor="start"),
        *matrix(24, 50, matrices("sinkhorn", 1, 1)[0, 0].tolist()),
    ]
    parts += [text(24, 260, "rows and columns sum to 1", anchor="start", size=12, colour=GREEN)]
    parts += [text(left - 30, 28, "largest gain of the product of k matrices", anchor="start")]
    parts += [line((left, bottom - height), (left, bottom), (left + width, bottom), arrow=False)]
    for power in range(4):
        parts.append(text(left - 8, bottom - height * power / 3 + 5, f"{10**power:,}", anchor="end", size=12))
    for k in (1, 48, 96):
        parts.append(text(left + width * k / sites, bottom + 18, str(k), size=12))
    parts.append(text(left + width / 2, bottom + 36, "sites", size=12))
    for manifold, colour, name in (("unconstrained", ORANGE, "any H"), ("sinkhorn", BLUE, "doubly stochastic H")):
        product, points = torch.eye(4, dtype=torch.float64), []
        for k, step in enumerate(matrices(manifold, 0.1, sites), 1):
            product = step @ product
            gain = math.log10(float(product.abs().sum(-1).max()))
            points.append((left + width * k / sites, bottom - height * gain / 3))
        parts += [
            line(*points, colour=colour, arrow=False),
            text(left + width, points[-1][1] - 8, name, anchor="end", colour=colour),
        ]
    return svg(740, 285, "A doubly stochastic matrix, and what constraining H does to products of it", parts)


def layers(arrows: Sequence[tuple[str, str]]) -> str:
    """Return boxes in layers for `arrows` from what imports to what is imported, which stands lower."""
    below: dict[str, list[str]] = {}
    for a, b in arrows:
        below.setdefault(a, []).append(b)
        below.setdefault(b, [])

    def depth(name: str) -> int:
        return 1 + max((depth(other) for other in below[name]), default=-1)

    rows: dict[int, list[str]] = {}
    for name in sorted(below):
        rows.setdefault(depth(name), []).append(name)
    across, place = 960, {}
    for level in sorted(rows):  # from the bottom: each box above the middle of what it imports
        middle = {n: sum(place[o][0] for o in below[n]) / max(len(below[n]), 1) for n in rows[level]}
        for i, name in enumerate(sorted(rows[level], key=lambda n: middle[n])):
            place[name] = (across * (i + 0.5) / len(rows[level]), 56 * (max(rows) - level) + 12)
    parts = []
    for a, b in arrows:
        (x, y), (u, v) = place[a], place[b]
        path = f"M{x:g} {y + 26:g} C{x:g} {y + 46:g} {u:g} {v - 22:g} {u:g} {v:g}"
        parts.append(f'<path d="{path}" fill="none" stroke="currentColor" stroke-opacity=".35"/>')
    for name, (x, y) in place.items():
        parts.append(f'<rect x="{x - 50:g}" y="{y:g}" width="100" height="26" rx="5" class="paper"/>')
        parts.append(box(x - 50, y, 100, 26, name, size=12))
    return svg(across, 56 * max(rows) + 52, "Units of the package, each above what it imports", parts)


if __name__ == "__main__":
    for name, draw in (("streams", streams), ("boundary", boundary), ("gains", gains)):
        (IMAGES / f"concept-{name}.svg").write_text(draw().replace("\n<defs>", f"\n{SYSTEM}\n<defs>"), encoding="utf-8")
