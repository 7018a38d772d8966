"""What the last line of a run of the tests says."""

from __future__ import annotations

from collections import Counter


def not_tested(reasons: list[str]) -> str:
    """Skipped tests by reason, where that is written ``what: how``; others are of cases that do not exist."""
    counted = Counter(reason for reason in reasons if ": " in reason)
    return f"not run: {'; '.join(f'{n} of {reason}' for reason, n in counted.most_common())}" if counted else ""
