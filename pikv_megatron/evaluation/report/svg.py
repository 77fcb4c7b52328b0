"""Two kinds of picture as SVG: points with their Pareto front, and heat maps.

Every mark says what it is when the pointer rests on it.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 34, 46
INK, MUTED, GRID, ACCENT = "#1f2328", "#6b7280", "#e5e7eb", "#2563eb"
PEERS = "#c2410c"
LOW, HIGH = (239, 246, 255), (23, 52, 120)  # of a heat map
CELL = 16
LABEL_STEP = 12  # between two labels, so that both can be read


class Point(NamedTuple):
    """A configuration in a picture.

    Attributes:
        name: of it.
        x: what it costs.
        y: what it is worth.
        is_peer: whether it is another library's.
    """

    name: str
    x: float
    y: float
    is_peer: bool = False


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats: by rising cost, each worth more than all before."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def scatter(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """Points over a logarithmic cost axis, with the front through the best."""
    xs, ys = [math.log2(p.x) for p in points], [p.y for p in points]
    x_ends, y_ends = _ends(xs, 0.5), _ends(ys, max(1.0, 0.08 * (max(ys) - min(ys))))

    def place(point: Point) -> tuple[float, float]:
        x = (math.log2(point.x) - x_ends[0]) / (x_ends[1] - x_ends[0])
        y = (point.y - y_ends[0]) / (y_ends[1] - y_ends[0])
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    parts = [_text(LEFT, 18, title, INK, 14, weight="600")]
    for power in range(math.ceil(x_ends[0]), math.floor(x_ends[1]) + 1):
        x, _ = place(Point("", 2.0**power, y_ends[0]))
        parts.append(_line(x, TOP, x, HEIGHT - BOTTOM))
        parts.append(_text(x, HEIGHT - BOTTOM + 16, _power(power), MUTED, 11, "middle"))
    for value in _ticks(*y_ends):
        _, y = place(Point("", 1.0, value))
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y))
        parts.append(_text(LEFT - 6, y + 4, f"{value:g}", MUTED, 11, "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, MUTED, 12, "middle"))
    parts.append(_text(LEFT, TOP - 4, y_label, MUTED, 11))
    front = " ".join("{:.1f},{:.1f}".format(*place(p)) for p in pareto(points))
    parts.append(
        f'<polyline points="{front}" fill="none" stroke="{ACCENT}" stroke-opacity="0.4" '
        'stroke-width="2"/>'
    )
    parts += _marks([(point, *place(point)) for point in points])
    return _svg(WIDTH, HEIGHT, parts)


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]],
    unit: str = "",
) -> str:
    """A cell a value, darker where it is larger; a negative value is none and stays white."""
    most = max((v for row in values for v in row), default=0.0) or 1.0
    left = 8 + 7 * max(map(len, rows), default=0)
    top = 40
    parts = [_text(left, 16, f"{title} (darkest: {most:.3g}{unit})", INK, 12, weight="600")]
    for j, column in enumerate(columns):
        if len(columns) <= 16 or j % 8 == 0:
            parts.append(_text(left + j * CELL + CELL / 2, 34, column, MUTED, 9, "middle"))
    for i, (name, row) in enumerate(zip(rows, values)):
        y = top + i * CELL
        parts.append(_text(left - 4, y + 12, name, MUTED, 10, "end"))
        for j, value in enumerate(row):
            hint = escape(f"{name}, {columns[j]}: " + (f"{value:.3g}{unit}" if value >= 0 else "-"))
            parts.append(
                f'<rect x="{left + j * CELL}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="{_shade(value / most)}"><title>{hint}</title></rect>'
            )
    width = left + max(len(columns) * CELL, 8 * len(title) + 120) + 8
    return _svg(width, top + len(rows) * CELL + 8, parts)


def _marks(placed: list[tuple[Point, float, float]]) -> list[str]:
    """Dots, and labels that step aside for one another."""
    parts, taken = [], []
    for point, x, y in sorted(placed, key=lambda p: p[2]):
        color = PEERS if point.is_peer else ACCENT
        at = y + 4
        while any(abs(at - other) < LABEL_STEP and abs(x - left) < 150 for left, other in taken):
            at += LABEL_STEP
        taken.append((x, at))
        hint = escape(f"{point.name}: {point.x:.4g}, {point.y:.4g}")
        parts.append(
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x + 7:.1f}" y2="{at - 4:.1f}" '
            f'stroke="{MUTED}" stroke-width="0.5"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"><title>{hint}</title>'
            "</circle>"
        )
        parts.append(_text(x + 8, at, point.name, color if point.is_peer else INK, 11))
    return parts


def _ends(values: list[float], margin: float) -> tuple[float, float]:
    return min(values) - margin, max(values) + margin


def _ticks(low: float, high: float) -> list[float]:
    size = 10 ** math.floor(math.log10(high - low))
    step = next(size * k for k in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (size * k) <= 8)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _power(power: int) -> str:
    return f"1/{2**-power}" if power < 0 else str(2**power)


def _shade(share: float) -> str:
    if share < 0:
        return "#ffffff"
    return "rgb({},{},{})".format(*(round(a + share * (b - a)) for a, b in zip(LOW, HIGH)))


def _text(
    x: float, y: float, text: str, fill: str, size: int, anchor: str = "start",
    weight: str = "400",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{GRID}"/>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" font-family="system-ui, sans-serif">'
        '<rect width="100%" height="100%" fill="#ffffff"/>' + "".join(parts) + "</svg>"
    )
