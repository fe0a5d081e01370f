"""How amounts of bytes are told."""

from __future__ import annotations

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def volume(n_bytes: float) -> str:
    """In the unit that suits it: "512 B", "633.28 GiB"."""
    power = min((max(1, int(n_bytes)).bit_length() - 1) // 10, len(UNITS) - 1)
    return f"{n_bytes / 1024**power:,.{2 if power else 0}f} {UNITS[power]}"
