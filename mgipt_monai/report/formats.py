# SPDX-License-Identifier: Apache-2.0
"""How the report writes numbers."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["percent", "points", "probability", "span"]


def percent(value: float, digits: int = 2) -> str:
    """Write a share in percent, without the sign.

    Example:
        >>> percent(0.92536), percent(0.25, digits=0)
        ('92.54', '25')
    """
    return f"{100 * value:.{digits}f}"


def points(value: float) -> str:
    """Write a difference of shares in percentage points, with its sign (a minus, not a hyphen).

    Example:
        >>> points(0.012), points(-0.0064)
        ('+1.20', '−0.64')
    """
    return f"{100 * value:+.2f}".replace("-", "−")


def span(interval: tuple[float, float] | None, write: Callable[[float], str] = percent) -> str:
    """Write an interval, which a single image has not.

    Example:
        >>> span((0.91, 0.93)), span((-0.01, 0.002), points), span(None)
        ('91.00 to 93.00', '−1.00 to +0.20', 'not defined')
    """
    if interval is None:
        return "not defined"
    low, high = interval
    return f"{write(low)} to {write(high)}"


def probability(value: float | None) -> str:
    """Write a p-value, a dash where there is none.

    Example:
        >>> probability(0.0123), probability(2e-9), probability(None)
        ('0.012', '< 0.001', '–')
    """
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
