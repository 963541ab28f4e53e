"""Layers, times, sizes and free text, worded the same on every page."""

import re
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import streamlit as st


def ordinal(n: int) -> str:
    """1 -> 1st, 2 -> 2nd, 11 -> 11th."""
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def layer_name(layer: int, n_layers: int) -> str:
    """Name a 0-based layer for people: ``layer 1 (2nd of 32)``."""
    return f"layer {layer} ({ordinal(layer + 1)} of {n_layers})"


def clock(seconds: float) -> str:
    """A Unix time in the reader's time zone: ``22 Nov 14:05``."""
    try:
        zone = ZoneInfo(st.context.timezone or "UTC")
    except (ValueError, OSError, KeyError):
        zone = UTC
    return datetime.fromtimestamp(seconds, zone).strftime("%-d %b %H:%M")


def duration(seconds: float) -> str:
    """A time span: ``0.4 s``, ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def size(count: float) -> str:
    """Bytes in binary units: ``812 MiB``, ``14.1 GiB``."""
    if count < 2**30:
        return f"{count / 2**20:,.0f} MiB"
    return f"{count / 2**30:,.1f} GiB"


def count(value: float) -> str:
    """A number of parameters: ``15.0 M``, ``6.74 B``."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"


def plain(text: str) -> str:
    """Text from outside (paths, prompts, messages) that markdown must show as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~$<>:])", r"\\\1", text)


def shorten(text: str, length: int = 40) -> str:
    """The text, or its end if it is longer: the end of a path says more than its beginning."""
    return text if len(text) <= length else f"…{text[1 - length :]}"
