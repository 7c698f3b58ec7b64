"""Numbers as people read them."""

import math

BLANK = "–"


def loss(value: float | None) -> str:
    return BLANK if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def signed(value: float | None) -> str:
    return BLANK if value is None else f"{value:+.3f}"


def percent(value: float | None) -> str:
    return BLANK if value is None else f"{100 * value:.1f}"


def p_value(value: float | None) -> str:
    return BLANK if value is None else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def count(value: float | None) -> str:
    """1234 -> 1,234; 9830400 -> 9.83M."""
    if value is None:
        return BLANK
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """For axes: 500k, 1M, 2k."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def tokens_axis(value: float) -> str:
    """For axes of context length: 512, 1K, 128K (powers of two)."""
    return f"{value / 1024:g}K" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def size(value: float | None) -> str:
    """Bytes with a binary unit."""
    if value is None:
        return BLANK
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return (
                f"{value:.0f} {unit}"
                if unit == "B"
                else f"{value:.3g} {unit}"
                if value < 1000
                else f"{value:,.0f} {unit}"
            )
        value /= 1024
    raise AssertionError


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return BLANK
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def duration_ms(seconds: float | None) -> str:
    """For latencies: milliseconds below a second."""
    return f"{1000 * seconds:.3g} ms" if seconds is not None and seconds < 1 else duration(seconds)


def plural(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"
