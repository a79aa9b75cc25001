"""Numbers as people read them: bytes, seconds, percentages, names in natural order."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

DASH = "–"


def number(value: object) -> float | None:
    """A finite number, or ``None`` for anything else: JSON from a broken run may hold NaN or words.

    Args:
        value: anything that JSON can hold.

    Example:
        >>> number(3), number(float("nan")), number("3"), number(True)
        (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def format_bytes(num_bytes: float | None) -> str:
    """Bytes with three digits and a binary unit.

    Args:
        num_bytes: how many, not negative; ``None`` where nobody knows.

    Example:
        >>> format_bytes(900), format_bytes(1536), format_bytes(1_258_291), format_bytes(None)
        ('900 B', '1.5 KiB', '1.2 MiB', '–')
    """
    if num_bytes is None:
        return DASH
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    # 1023.9 KiB would be printed as 1024 KiB: it is 1 MiB to a reader.
    while round(size) >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    text = f"{size:.0f}" if size.is_integer() or units[0] == "B" or size >= 99.95 else f"{size:.1f}"
    return f"{text} {units[0]}"


def format_seconds(seconds: float | None) -> str:
    """A duration in the unit that suits it.

    Args:
        seconds: not negative; ``None`` where nobody knows.

    Example:
        >>> format_seconds(0.0123), format_seconds(3.21), format_seconds(75), format_seconds(7260)
        ('12 ms', '3.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds is None:
        return DASH
    if seconds <= 0:
        return "0 s"
    if seconds < 0.0005:
        return "< 1 ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if whole < 600:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    if round(seconds / 60) < 60:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def format_percent(share: float | None, digits: int = 1) -> str:
    """A share of one as a percentage.

    Args:
        share: usually in [0, 1]; ``None`` where nobody knows.
        digits: digits after the point.

    Example:
        >>> format_percent(0.9412), format_percent(None)
        ('94.1 %', '–')
    """
    return DASH if share is None else f"{100 * share:.{digits}f} %"


def format_count(count: float | None) -> str:
    """A count with thin groups of three digits; a mean of counts keeps one digit after the point.

    Args:
        count: how many; ``None`` where nobody knows.

    Example:
        >>> format_count(1234567), format_count(2.5)
        ('1,234,567', '2.5')
    """
    if count is None:
        return DASH
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"


def in_words(settings: Mapping[str, object]) -> str:
    """Settings and their values in a few words: the last word of each key.

    Args:
        settings: full key to value.

    Example:
        >>> in_words({"data.partition.dirichlet_alpha": 0.1, "data.partition.num_clients": 5})
        'dirichlet_alpha 0.1, num_clients 5'
    """
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorting key under which ``client_2`` comes before ``client_10``.

    Args:
        name: any text.

    Example:
        >>> sorted(["client_10", "client_2"], key=natural_key)
        ['client_2', 'client_10']
    """
    parts = re.split(r"([0-9]+)", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part)


def shorten(text: str, length: int) -> str:
    """A text that fits on one line of a picture.

    Args:
        text: anything; runs of white space become one space.
        length: most letters, at least 2.

    Example:
        >>> shorten("a very long name", 8)
        'a very …'
    """
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
