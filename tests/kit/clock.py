"""A clock that tests set."""

from __future__ import annotations

import stockrt


class FakeClock(stockrt.Clock):
    """Stands still until it is told otherwise; both of its times move together."""

    def __init__(self, wall: float = 1_750_000_000.0, monotonic: float = 1_000.0) -> None:
        self.now_wall = wall
        self.now_monotonic = monotonic

    def wall(self) -> float:
        return self.now_wall

    def monotonic(self) -> float:
        return self.now_monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_wall += seconds
        self.now_monotonic += seconds
