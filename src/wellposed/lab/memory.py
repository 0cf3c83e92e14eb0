"""Peak memory of a piece of work inside a process that lives on."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Largest resident memory since `start`, above what the process held then; None where the system cannot tell.

    A process's own maximum never falls, so that a worker which runs many trials would report the largest of them
    for all. Linux can reset its high-water mark.

    Example:
        >>> peak = PeakMemory()
        >>> peak.start()
        >>> peak.read() is None or peak.read() >= 0
        True
    """

    def __init__(self) -> None:
        self._before: int | None = None

    def start(self) -> None:
        """Reset the mark."""
        try:
            _CLEAR.write_text("5")
            self._before = _field("VmRSS")
        except OSError:
            self._before = None

    def read(self) -> int | None:
        """Bytes."""
        if self._before is None:
            return None
        peak = _field("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _field(name: str) -> int | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
