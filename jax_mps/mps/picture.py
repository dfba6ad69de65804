"""Windows on an image as SVG text: what `draw_windows` shows.

Everything is integers of `geometry.Axis`; nothing here knows a kernel. A picture has two panels: the image
with its surroundings and the windows on it, and the destination with one pixel for every window, in the
colour of that window.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator
from pathlib import Path

from jax_mps import _files
from jax_mps.geometry import Axis

__all__ = ["Line", "Picture", "draw"]

CELL, MARGIN, GAP = 24, 14, 56
MOST = 28
"""Pixels along one axis that a panel shows; the rest of a larger image is cut off."""

SURROUNDINGS = 6
"""Pixels around the image that a picture shows at most."""

COLOURS = ("#d9480f", "#1971c2", "#2b8a3e", "#9c36b5", "#a37b00", "#0b7285")
"""Of the windows, in turn."""

LINE, TEXT, HATCH = "#adb5bd", "#343a40", "#ced4da"

KINDS = {
    "read": ("#dbe9f9", "read by a window"),
    "unread": ("#f8f9fa", "read by no window"),
    "inserted": ("#ffffff", "inserted zero"),
    "band": ("#e3f5e6", "zero that the average counts"),
    "zero": ("#f1f3f5", "outside: reads 0"),
    "clamp": ("#fff0cc", "outside: reads the nearest pixel"),
    "shrink": ("#ffffff", "outside: not read, not counted"),
}
"""Fill and meaning of the pixels of the first panel."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An SVG image. Notebooks show it; `save` writes it to a file; `svg` is its text.

    Attributes:
      svg: the whole image as SVG text, without scripts and without references to anything outside.
    """

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> None:
        """Writes the image to an `.svg` file, which is never half written."""
        _files.replace(path, self.svg.encode())


@dataclasses.dataclass(frozen=True)
class Line:
    """One axis of a picture.

    Attributes:
      axis: the image's pixels and the windows on them.
      pixels: the destination's pixels.
      first: which of them is the first window's.
      step: every `step`-th pixel of the image is a sample, the others are inserted zeros.
      band: zeros on both sides of the image that an average counts.
    """

    axis: Axis
    pixels: int
    first: int = 0
    step: int = 1
    band: int = 0

    def taps(self, window: int) -> list[int]:
        """The pixels under the taps of a window."""
        a = self.axis
        return [a.stride * window - a.low + a.dilation * k for k in range(a.taps)]

    def reads(self, edge: str) -> set[int]:
        """The pixels of the image that some window reads."""
        a = self.axis
        taps = {t for i in range(a.windows) for t in self.taps(i)}
        if edge == "clamp":
            taps = {min(max(t, 0), a.size - 1) for t in taps}
        return {t for t in taps if 0 <= t < a.size}

    @property
    def view(self) -> range:
        """The pixels to show."""
        a, ends = self.axis, [-self.band, self.axis.size + self.band]
        for i in {0, a.windows - 1} if a.windows else ():
            taps = self.taps(i)
            ends += [taps[0], taps[-1] + 1]
        room = max(SURROUNDINGS, self.band)
        low, high = max(min(ends), -room), min(max(ends), a.size + room)
        return range(low, min(high, low + MOST))


def draw(title: str, image: str, result: str, rest: str, rows: Line, columns: Line, edge: str) -> Picture:
    """The picture of all windows that pair a window of `rows` with one of `columns`.

    Args:
      title: what the picture is of.
      image: what the first panel shows.
      result: what the second panel shows.
      rest: what a pixel of the second panel without a window is.
      rows: the y axis.
      columns: the x axis.
      edge: what a tap outside the image reads: "zero", "clamp" (the nearest pixel) or "shrink" (nothing).
    """
    if any(line.view.stop < line.axis.size for line in (rows, columns)):
        image += ", its top left corner"
    left, top = MARGIN + 22, MARGIN + 66
    right = left + max(CELL * len(columns.view), 7 * len(image)) + GAP
    shown = [min(line.pixels, MOST) for line in (rows, columns)]
    width = max(right + max(CELL * shown[1], 7 * len(result)), 9 * len(title)) + MARGIN
    bottom = top + CELL * max(len(rows.view), shown[0]) + 24
    pixels, kinds = _image(rows, columns, edge, left, top)
    legend, height = _legend(rows, columns, kinds, rest, bottom, width)
    parts = [
        _text(MARGIN, MARGIN + 12, title, size=15, weight=600),
        _text(left, MARGIN + 38, image),
        _text(right, MARGIN + 38, result),
        *pixels,
        *_windows(rows, columns, left, top),
        *_destination(rows, columns, right, top),
        *legend,
    ]
    return Picture(
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' "
        f"height='{height}' style='max-width:100%;height:auto' role='img' "
        f"aria-label='{html.escape(title, quote=True)}' font-family='system-ui,Helvetica,Arial,sans-serif'>"
        f"<rect width='{width}' height='{height}' rx='6' fill='#ffffff'/>{''.join(parts)}</svg>"
    )


def _image(rows: Line, columns: Line, edge: str, left: int, top: int) -> tuple[list[str], list[str]]:
    """The pixels of the first panel, and which kinds there are."""
    reads = rows.reads(edge), columns.reads(edge)
    cells: dict[str, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
    for r, y in enumerate(rows.view):
        for c, x in enumerate(columns.view):
            kind = _kind((rows, columns), (y, x), reads, edge)
            cells[kind].append((left + CELL * c, top + CELL * r))
    parts = []
    for kind, places in cells.items():
        dashes = " stroke-dasharray='2 3'" if kind in ("zero", "clamp", "shrink", "band") else ""
        parts.append(_squares(places, f"fill='{KINDS[kind][0]}' stroke='{LINE}' stroke-width='.7'{dashes}"))
        if kind == "unread":
            parts.append(_hatching(places))
        if kind in ("inserted", "band", "zero"):
            parts += [
                _text(x + CELL / 2, y + CELL / 2 + 4, "0", size=10, colour="#868e96", anchor="middle")
                for x, y in places
            ]
    spans = [_inside(line) for line in (rows, columns)]
    (y0, y1), (x0, x1) = spans
    parts.append(
        _box(
            left + CELL * x0,
            top + CELL * y0,
            CELL * (x1 - x0),
            CELL * (y1 - y0),
            f"stroke='{TEXT}' stroke-width='1.8'",
        )
    )
    parts += _numbers(columns.view, left + CELL / 2, top - 6, across=True)
    parts += _numbers(rows.view, left - 6, top + CELL / 2 + 3, across=False)
    return parts, [kind for kind, places in cells.items() if places]


def _kind(lines: tuple[Line, Line], at: tuple[int, int], reads: tuple[set[int], set[int]], edge: str) -> str:
    pairs = list(zip(lines, at, strict=True))
    if all(0 <= t < line.axis.size for line, t in pairs):
        if any(t % line.step for line, t in pairs):
            return "inserted"
        return "read" if all(t in read for t, read in zip(at, reads, strict=True)) else "unread"
    if any(line.band for line in lines) and all(-n.band <= t < n.axis.size + n.band for n, t in pairs):
        return "band"
    return edge


def _windows(rows: Line, columns: Line, left: int, top: int) -> Iterator[str]:
    """The outlines and centres of the windows, the first one last so that it lies on top.

    Where windows lie more than two deep, only the first, its neighbours and the last are outlined.
    """
    y, x = rows.view, columns.view
    pairs = [(j, i) for j in range(rows.axis.windows) for i in range(columns.axis.windows)]
    crowded = any(line.axis.extent > 2 * line.axis.stride for line in (rows, columns))
    outlined = {(0, 0), (0, 1), (1, 0), pairs[-1]} if crowded and pairs else set(pairs)
    for j, i in reversed(pairs):
        tall, wide = rows.taps(j), columns.taps(i)
        y0, y1 = max(tall[0], y.start), min(tall[-1] + 1, y.stop)
        x0, x1 = max(wide[0], x.start), min(wide[-1] + 1, x.stop)
        if y0 >= y1 or x0 >= x1:
            continue
        colour, first = _colour(j, i), j == i == 0
        inset = 2 + 2 * ((j + i) % 3)
        if first:
            taps = [
                (left + CELL * (u - x.start), top + CELL * (v - y.start))
                for v in tall
                if v in y
                for u in wide
                if u in x
            ]
            yield _squares(taps, f"fill='{colour}' fill-opacity='.22'")
        if (j, i) in outlined:
            yield _box(
                left + CELL * (x0 - x.start) + inset,
                top + CELL * (y0 - y.start) + inset,
                CELL * (x1 - x0) - 2 * inset,
                CELL * (y1 - y0) - 2 * inset,
                f"rx='4' stroke='{colour}' stroke-width='{2.4 if first else 1.3}'",
            )
        v, u = tall[0] + rows.axis.extent // 2, wide[0] + columns.axis.extent // 2
        if v in y and u in x:
            yield _dot(left + CELL * (u - x.start), top + CELL * (v - y.start), colour, first)


def _destination(rows: Line, columns: Line, left: int, top: int) -> Iterator[str]:
    """The pixels of the second panel, in the colours of their windows."""
    height, width = (min(line.pixels, MOST) for line in (rows, columns))
    untouched = []
    for r in range(height):
        for c in range(width):
            place = left + CELL * c, top + CELL * r
            j, i = r - rows.first, c - columns.first
            if 0 <= j < rows.axis.windows and 0 <= i < columns.axis.windows:
                colour = _colour(j, i)
                yield _squares(
                    [place], f"fill='{colour}' fill-opacity='.22' stroke='{LINE}' stroke-width='.7'"
                )
                yield _dot(*place, colour, j == i == 0)
            else:
                untouched.append(place)
    yield _squares(untouched, f"fill='{KINDS['unread'][0]}' stroke='{LINE}' stroke-width='.7'")
    yield _hatching(untouched)
    yield _box(left, top, CELL * width, CELL * height, f"stroke='{TEXT}' stroke-width='1.8'")
    yield from _numbers(range(width), left + CELL / 2, top - 6, across=True)
    yield from _numbers(range(height), left - 6, top + CELL / 2 + 3, across=False)


def _legend(
    rows: Line, columns: Line, kinds: list[str], rest: str, y: int, width: int
) -> tuple[list[str], int]:
    """What the colours mean, in as many lines as it takes, and where they end."""
    entries = [
        (f"fill='{KINDS[kind][0]}' stroke='{LINE}'", KINDS[kind][1], kind == "unread") for kind in kinds
    ]
    if rows.axis.windows and columns.axis.windows:
        first = f"fill='{COLOURS[0]}' fill-opacity='.22' stroke='{COLOURS[0]}' stroke-width='2'"
        entries.append((first, "first window, its taps and its centre", False))
    if rows.axis.windows < rows.pixels or columns.axis.windows < columns.pixels:
        entries.append((f"fill='{KINDS['unread'][0]}' stroke='{LINE}'", rest, True))
    parts, x = [], MARGIN
    for style, meaning, hatched in entries:
        needed = 24 + round(6.3 * len(meaning)) + 14
        if x > MARGIN and x + needed > width:
            x, y = MARGIN, y + 20
        parts.append(f"<rect x='{x}' y='{y}' width='14' height='14' rx='2' {style}/>")
        if hatched:
            parts.append(f"<path d='M{x} {y + 14}l14 -14' stroke='{HATCH}' stroke-width='1'/>")
        parts.append(_text(x + 20, y + 11, meaning, size=11))
        x += needed
    return parts, y + 20 + MARGIN


# --- small things -------------------------------------------------------------------------------------


def _colour(j: int, i: int) -> str:
    """Neighbours differ, along either axis and across."""
    return COLOURS[(i + 2 * j) % len(COLOURS)]


def _inside(line: Line) -> tuple[int, int]:
    """Where the image begins and ends in the view."""
    view = line.view
    return -view.start, min(line.axis.size, view.stop) - view.start


def _squares(places: list[tuple[int, int]], style: str) -> str:
    path = "".join(f"M{x} {y}h{CELL}v{CELL}h-{CELL}z" for x, y in places)
    return f"<path d='{path}' {style}/>" if path else ""


def _hatching(places: list[tuple[int, int]]) -> str:
    half = CELL // 2
    path = "".join(
        f"M{x} {y + half}l{half} -{half}M{x} {y + CELL}l{CELL} -{CELL}M{x + half} {y + CELL}l{half} -{half}"
        for x, y in places
    )
    return f"<path d='{path}' stroke='{HATCH}' stroke-width='1' fill='none'/>" if path else ""


def _box(x: int, y: int, width: int, height: int, style: str) -> str:
    return f"<rect x='{x}' y='{y}' width='{max(width, 0)}' height='{max(height, 0)}' fill='none' {style}/>"


def _dot(x: int, y: int, colour: str, first: bool) -> str:
    style = "r='4.5' stroke='#ffffff' stroke-width='1.5'" if first else "r='2.6'"
    return f"<circle cx='{x + CELL // 2}' cy='{y + CELL // 2}' fill='{colour}' {style}/>"


def _numbers(view: range, x: float, y: float, *, across: bool) -> Iterator[str]:
    """Coordinates along an axis, all of them where there is room."""
    every = 1 if len(view) <= 20 else 5
    for place, number in enumerate(view):
        if number % every == 0:
            dx, dy, anchor = (CELL * place, 0, "middle") if across else (0, CELL * place, "end")
            yield _text(x + dx, y + dy, str(number), size=9, colour="#868e96", anchor=anchor)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: int = 400,
    colour: str = TEXT,
    anchor: str = "start",
) -> str:
    font = f"font-size='{size}' font-weight='{weight}' text-anchor='{anchor}'"
    return f"<text x='{x}' y='{y}' {font} fill='{colour}'>{html.escape(text)}</text>"
