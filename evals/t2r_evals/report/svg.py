"""Small charts as SVG text: no script, no font, no colour of their own (classes s0..s7 are coloured by the page)."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape, quoteattr

WIDTH, HEIGHT = 460, 290
RIGHT, BOTTOM = 16, 44
CHARACTER = 6.8  # mean width of a character at font-size 12, for laying out text that cannot be measured here

# Colours for both schemes; the page and the stand-alone files share them.
STYLE = """
.chart{--ink:#1f2328;--muted:#59636e;--grid:#d9dee3;--s0:#3d444d;--s1:#0969da;--s2:#bc4c00;--s3:#8250df;--s4:#1a7f37;
--s5:#bf3989;--s6:#9a6700;--s7:#0a7d91;font:12px system-ui,-apple-system,"Segoe UI",sans-serif;
max-width:100%;height:auto}
@media (prefers-color-scheme:dark){.chart{--ink:#e6edf3;--muted:#9aa4af;--grid:#343b43;--s0:#c9d1d9;--s1:#58a6ff;
--s2:#f0883e;--s3:#bc8cff;--s4:#56d364;--s5:#ff7bbf;--s6:#e3b341;--s7:#4fc9dd}}
.chart text{fill:var(--ink)}.chart .tick,.chart .axis{fill:var(--muted)}.chart .grid{stroke:var(--grid);stroke-width:1}
.chart .zero{stroke:var(--muted);stroke-width:1}.chart .line{fill:none;stroke-width:2;stroke-linejoin:round}
.chart .dash{stroke-dasharray:5 4}.chart .range{stroke:var(--ink);stroke-width:1.5}
""" + "".join(f".chart .s{i}{{stroke:var(--s{i});fill:var(--s{i})}}.chart .line.s{i}{{fill:none}}" for i in range(8))
STYLE += ".chart .bar{stroke:none}"


@dataclass(frozen=True)
class Series:
    """A named line through points (x, y); `color` 0..7. `points` draws a marker with a hover title at each."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    dashed: bool = False
    points: bool = True


@dataclass(frozen=True)
class Bar:
    """A horizontal bar from 0 to `value`, or with `low` and `high` a point with its interval."""

    label: str
    value: float
    color: int
    low: float | None = None
    high: float | None = None


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_log: bool = False,
    y_log: bool = False,
    x_format: Callable[[float], str] = lambda x: f"{x:g}",
    y_format: Callable[[float], str] = lambda y: f"{y:g}",
    y_base: int = 10,
    from_zero: bool = False,
) -> str:
    """Lines over a common x axis; `title` is the text alternative. Log axes tick at powers of 2 (x) or `y_base`."""
    series = [_finite(s, x_log, y_log) for s in series]
    xs = [x for s in series for x in s.x]
    ys = [y for s in series for y in s.y] + ([0.0] if from_zero else [])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    _, y_ticks = _axis(min(ys), max(ys), bottom, 0, log=y_log, base=y_base, wanted=5, pad=True)
    y_labels = _tick_labels(y_ticks, y_format)
    left = 26 + CHARACTER * max(map(len, y_labels))
    legend, top = _legend(series, left)
    x_at, x_ticks = _axis(min(xs), max(xs), left, right, log=x_log, base=2, wanted=6)
    y_at, y_ticks = _axis(min(ys), max(ys), bottom, top, log=y_log, base=y_base, wanted=5, pad=True)
    parts = [legend]
    for tick, label in zip(y_ticks, y_labels, strict=True):
        y = y_at(tick)
        parts.append(
            f'<line class="{"zero" if tick == 0 else "grid"}" x1="{left:.1f}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text class="tick" x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for tick, label in zip(x_ticks, _tick_labels(x_ticks, x_format), strict=True):
        x = x_at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(label)}</text>')
    for s in series:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(s.x, s.y, strict=True))
        parts.append(f'<polyline class="line s{s.color}{" dash" if s.dashed else ""}" points="{path}"/>')
        if s.points:
            for x, y in zip(s.x, s.y, strict=True):
                hover = escape(f"{s.label}: {y_format(y)} at {x_format(x)}")
                parts.append(f'<circle class="s{s.color}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3">')
                parts.append(f"<title>{hover}</title></circle>")
    parts.append(_axis_titles(x_label, y_label, left, top, bottom))
    return _document(title, HEIGHT, parts)


def bar_chart(
    bars: Sequence[Bar], *, title: str, x_label: str, value_format: Callable[[float], str] = lambda v: f"{v:g}"
) -> str:
    """Horizontal bars from a common zero, their values written beside them."""
    row, top = 30, 8
    bottom = top + row * len(bars)
    height = bottom + BOTTOM
    left = min(190.0, max(len(bar.label) for bar in bars) * CHARACTER + 12)
    limit = int((left - 10) / CHARACTER)
    reach = [v for b in bars for v in (b.value, b.low, b.high) if v is not None and math.isfinite(v)] + [0.0]
    at, ticks = _axis(min(reach), max(reach), left, WIDTH - RIGHT - 58, log=False, base=10, wanted=4)
    parts = []
    for tick in ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{at(tick):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{escape(value_format(tick))}</text>"
        )
    for index, bar in enumerate(bars):
        middle = top + row * (index + 0.5)
        hover = escape(f"{bar.label}: {value_format(bar.value)}")
        parts.append(
            f'<text x="{left - 8:.1f}" y="{middle + 4:.1f}" text-anchor="end">{escape(_cut(bar.label, limit))}'
            f"<title>{escape(bar.label)}</title></text>"
        )
        end = at(bar.value)
        if bar.low is not None and bar.high is not None:
            ends = [at(min(max(v, min(reach)), max(reach))) for v in (bar.low, bar.high)]
            parts.append(
                f'<line class="range" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
                f'<circle class="s{bar.color}" cx="{end:.1f}" cy="{middle:.1f}" r="5"><title>{hover}</title></circle>'
            )
            end = max(ends)
        else:
            x, width = min(at(0.0), end), abs(end - at(0.0))
            parts.append(
                f'<rect class="bar s{bar.color}" x="{x:.1f}" y="{middle - 9:.1f}" width="{max(width, 1):.1f}" '
                f'height="18" rx="2"><title>{hover}</title></rect>'
            )
            end = max(end, at(0.0))
        parts.append(f'<text x="{end + 6:.1f}" y="{middle + 4:.1f}">{escape(value_format(bar.value))}</text>')
    middle = (left + WIDTH - RIGHT - 58) / 2
    parts.append(f'<text class="axis" x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    return _document(title, height, parts)


def heat_map(
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    x_label: str,
    y_label: str,
    value_format: Callable[[float], str] = lambda v: f"{v:.2f}",
) -> str:
    """Values 0..1 as shades with their numbers; `values` [row][column], None where nothing was measured."""
    left, top, cell = 34 + CHARACTER * max(map(len, rows)), 8.0, 30.0
    width = min(90.0, (WIDTH - RIGHT - left) / len(columns))
    parts = []
    for i, (label, line) in enumerate(zip(rows, values, strict=True)):
        y = top + i * cell
        parts.append(f'<text class="tick" x="{left - 6:.1f}" y="{y + 19:.1f}" text-anchor="end">{escape(label)}</text>')
        for j, value in enumerate(line):
            x = left + j * width
            if value is None:
                continue
            # Never opaque: the number on top must stay readable in both schemes.
            shade, shown = 0.04 + 0.56 * value, escape(value_format(value))
            parts.append(
                f'<rect class="bar s1" fill-opacity="{shade:.2f}" x="{x + 1:.1f}" y="{y + 1:.1f}" '
                f'width="{width - 2:.1f}" height="{cell - 2:.1f}" rx="3">'
                f"<title>{escape(rows[i])}, {escape(columns[j])}: {shown}</title></rect>"
                f'<text x="{x + width / 2:.1f}" y="{y + 19:.1f}" text-anchor="middle">{shown}</text>'
            )
    bottom = top + cell * len(rows)
    for j, label in enumerate(columns):
        x = left + (j + 0.5) * width
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>')
    middle, centre = (top + bottom) / 2, left + width * len(columns) / 2
    parts.append(f'<text class="axis" x="{centre:.1f}" y="{bottom + 36}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="axis" transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">')
    parts.append(f"{escape(y_label)}</text>")
    return _document(title, bottom + BOTTOM, parts)


def standalone(svg: str) -> str:
    """The chart as a file of its own, with its style."""
    sized = re.sub(r'viewBox="0 0 (\S+) (\S+)"', r'width="\1" height="\2" \g<0>', svg, count=1)
    return sized.replace("<title>", f"<style>{escape(STYLE)}</style><title>", 1) + "\n"


def _document(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f"aria-label={quoteattr(title)}><title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _axis_titles(x_label: str, y_label: str, left: float, top: float, bottom: float) -> str:
    x, y = (left + WIDTH - RIGHT) / 2, (top + bottom) / 2
    return (
        f'<text class="axis" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="axis" transform="translate(12 {y:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )


def _legend(series: Sequence[Series], left: float) -> tuple[str, float]:
    """Legend rows above the plot, and the y where the plot may begin."""
    x, y, parts = left, 14.0, []
    for s in series:
        label = _cut(s.label, 44)
        width = 28 + len(label) * CHARACTER
        if x > left and x + width > WIDTH - 4:
            x, y = left, y + 18
        dash = " dash" if s.dashed else ""
        parts.append(
            f'<line class="line s{s.color}{dash}" x1="{x:.1f}" x2="{x + 16:.1f}" y1="{y - 4:.1f}" y2="{y - 4:.1f}"/>'
            f'<text x="{x + 21:.1f}" y="{y:.1f}">{escape(label)}</text>'
        )
        x += width + 8
    return "".join(parts), y + 14


def _finite(s: Series, x_log: bool, y_log: bool) -> Series:
    kept = [
        (x, y)
        for x, y in zip(s.x, s.y, strict=True)
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not x_log) and (y > 0 or not y_log)
    ]
    return Series(s.label, [x for x, _ in kept], [y for _, y in kept], s.color, s.dashed, s.points)


def _axis(
    low: float, high: float, start: float, end: float, *, log: bool, base: int, wanted: int, pad: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """Map from value to coordinate, and the ticks."""
    if log:
        if low == high:
            low, high = low / base, high * base
        first, last = math.log(low, base), math.log(high, base)
        exponents = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
        every = max(1, math.ceil((last - first) / wanted))
        ticks = [float(base) ** e for e in exponents if (exponents[-1] - e) % every == 0]
        return (lambda v: start + (math.log(v, base) - first) / (last - first) * (end - start)), ticks
    if low == high:
        middle = (start + end) / 2
        return (lambda v: middle + (v - low) * (end - start)), [low]
    step = _nice((high - low) / wanted)
    if pad:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    count = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return (lambda v: start + (v - low) / (high - low) * (end - start)), [round(i * step, 12) for i in count]


def _tick_labels(ticks: Sequence[float], wanted: Callable[[float], str]) -> list[str]:
    """The wanted labels, or plain numbers with as many digits as it takes to tell the ticks apart."""
    labels = [wanted(tick) for tick in ticks]
    digits = 2
    while len(set(labels)) < len(labels):
        digits += 1
        labels = [f"{tick:.{digits}f}" for tick in ticks]
    return labels


def _nice(rough: float) -> float:
    """The step 1, 2, 2.5, 5 or 10 times a power of ten that is closest above `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def downsample(x: Sequence[float], y: Sequence[float], points: int = 240) -> tuple[list[float], list[float]]:
    """Means over equal runs of points, so that a long noisy curve stays readable and small."""
    if len(x) <= points:
        return list(x), list(y)
    edges = [round(i * len(x) / points) for i in range(points + 1)]
    runs = [(a, b) for a, b in pairwise(edges) if b > a]
    return [sum(x[a:b]) / (b - a) for a, b in runs], [sum(y[a:b]) / (b - a) for a, b in runs]
