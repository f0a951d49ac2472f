"""A count of requests that tests do without."""

from __future__ import annotations

from collections.abc import Sequence

from stockrt import UNLIMITED, Lease, Plan


class NoLedger:
    """Grants whatever is asked, and counts nothing."""

    def lease(self, digest: str, plan: Plan, now: float, made: Sequence[float] = ()) -> Lease:
        """Grant it."""
        return UNLIMITED

    def give_back(
        self, digest: str, plan: Plan, lease: Lease, now: float, made: Sequence[float] = ()
    ) -> None:
        """Nothing is counted."""

    def used_today(self, digest: str, now: float) -> int | None:
        """Nothing is known."""
        return None
