# SPDX-License-Identifier: Apache-2.0
"""A small writer of line charts as SVG: two axes, lines told apart by colour, dash and marker.

Knows nothing of what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 62, 78
TEXT = 'font-family="sans-serif"'
Point = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """How a line is told from others, with and without colour."""

    colour: str
    dash: str = ""
    marker: str = ""
    """circle, square, or none."""
    width: float = 2.2
    opacity: float = 1.0


@dataclass
class Axis:
    """One axis. `ticks` are given; `log` is by powers of two of what lies between low and high."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False
    label: Callable[[float], str] = "{:g}".format

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end; what lies outside is cut off."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log2(value / self.low) / math.log2(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass
class Chart:
    """Lines within two axes; `write` makes the file."""

    title: str
    subtitle: str
    x: Axis
    y: Axis
    _body: list[str] = field(default_factory=list)
    _legend: list[tuple[str, Look]] = field(default_factory=list)

    def at(self, point: Point) -> Point:
        x = LEFT + self.x.place(point[0]) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - self.y.place(point[1]) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    def line(self, points: Sequence[Point], look: Look, name: str = "") -> None:
        """`name` puts it into the legend."""
        where = [self.at(point) for point in points]
        path = " ".join(f"{x},{y}" for x, y in where)
        dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
        self._body.append(
            f'<polyline points="{path}" fill="none" stroke="{look.colour}" stroke-width='
            f'"{look.width}" stroke-opacity="{look.opacity}" stroke-linejoin="round"{dash}/>'
        )
        self._body += [_marker(x, y, look) for x, y in where]
        if name:
            self._legend.append((name, look))

    def dots(self, points: Sequence[Point], look: Look) -> None:
        """Single runs behind a line."""
        self._body += [_marker(*self.at(point), look, 2.5) for point in points]

    def mark(self, x: float, text: str) -> None:
        """A vertical line with a word at its top."""
        at, _ = self.at((x, self.y.low))
        self._body.append(
            f'<line x1="{at}" y1="{TOP}" x2="{at}" y2="{HEIGHT - BOTTOM}" stroke="#555" '
            f'stroke-width="1" stroke-dasharray="2 3"/>'
            f'<text x="{at + 5}" y="{TOP + 12}" {TEXT} font-size="12" fill="#333">'
            f"{escape(text)}</text>"
        )

    def level(self, y: float, text: str) -> None:
        """A horizontal line with a word at its right end."""
        _, at = self.at((self.x.low, y))
        self._body.append(
            f'<line x1="{LEFT}" y1="{at}" x2="{WIDTH - RIGHT}" y2="{at}" stroke="#555" '
            f'stroke-width="1" stroke-dasharray="2 3"/>'
            f'<text x="{WIDTH - RIGHT - 4}" y="{at - 5}" text-anchor="end" {TEXT} '
            f'font-size="12" fill="#333">{escape(text)}</text>'
        )

    def _axes(self) -> list[str]:
        out = []
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for tick in self.x.ticks:
            x, _ = self.at((tick, self.y.low))
            out.append(
                f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom + 5}" stroke="#e2e2e2"/>'
                f'<text x="{x}" y="{bottom + 20}" text-anchor="middle" {TEXT} font-size="13" '
                f'fill="#222">{escape(self.x.label(tick))}</text>'
            )
        for tick in self.y.ticks:
            _, y = self.at((self.x.low, tick))
            out.append(
                f'<line x1="{LEFT - 5}" y1="{y}" x2="{right}" y2="{y}" stroke="#e2e2e2"/>'
                f'<text x="{LEFT - 9}" y="{y + 4.5}" text-anchor="end" {TEXT} font-size="13" '
                f'fill="#222">{escape(self.y.label(tick))}</text>'
            )
        middle = (LEFT + right) / 2
        out.append(
            f'<path d="M{LEFT} {TOP} V{bottom} H{right}" fill="none" stroke="#222"/>'
            f'<text x="{middle}" y="{bottom + 40}" text-anchor="middle" {TEXT} font-size="14" '
            f'fill="#111">{escape(self.x.title)}</text>'
            f'<text transform="translate(17 {(TOP + bottom) / 2}) rotate(-90)" text-anchor='
            f'"middle" {TEXT} font-size="14" fill="#111">{escape(self.y.title)}</text>'
        )
        return out

    def _legends(self) -> list[str]:
        out, x = [], float(LEFT)
        for name, look in self._legend:
            y = HEIGHT - 14
            dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
            out.append(
                f'<line x1="{x}" y1="{y}" x2="{x + 34}" y2="{y}" stroke="{look.colour}" '
                f'stroke-width="{look.width}"{dash}/>{_marker(x + 17, y, look)}'
                f'<text x="{x + 40}" y="{y + 4.5}" {TEXT} font-size="13" fill="#111">'
                f"{escape(name)}</text>"
            )
            x += 56 + 7.0 * len(name)
        return out

    def write(self, path: Path) -> None:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" role="img">'
            f"<title>{escape(self.title)}</title>"
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
            f'<text x="{LEFT}" y="26" {TEXT} font-size="17" font-weight="bold" fill="#111">'
            f"{escape(self.title)}</text>"
            f'<text x="{LEFT}" y="46" {TEXT} font-size="12.5" fill="#444">'
            f"{escape(self.subtitle)}</text>"
        )
        lines = [head, *self._axes(), *self._body, *self._legends(), "</svg>"]
        path.write_text("\n".join(lines) + "\n")


def _marker(x: float, y: float, look: Look, size: float = 4.0) -> str:
    if look.marker == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{size}" fill="{look.colour}"/>'
    if look.marker == "square":
        side = 2 * size - 1
        return (
            f'<rect x="{x - side / 2}" y="{y - side / 2}" width="{side}" height="{side}" '
            f'fill="#fff" stroke="{look.colour}" stroke-width="1.8"/>'
        )
    return ""
