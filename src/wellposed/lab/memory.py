"""Peak memory of a process during one piece of work, though the process lives on."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Largest resident memory of this process since `start`; None where the system cannot tell.

    A process's own maximum never falls, so that a worker which runs many trials would report the largest of them
    for all. Linux can reset its high-water mark.

    Example:
        >>> peak = PeakMemory()
        >>> peak.start()
        >>> peak.read() is None or peak.read() > 0
        True
    """

    def __init__(self) -> None:
        self._reset = False

    def start(self) -> None:
        """Reset the mark."""
        try:
            _CLEAR.write_text("5")
            self._reset = True
        except OSError:
            self._reset = False

    def read(self) -> int | None:
        """Bytes."""
        return _field("VmHWM") if self._reset else None


def _field(name: str) -> int | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
