"""A run in, what resident memory does meanwhile out (Linux)."""

from __future__ import annotations

from pathlib import Path


class Peak:
    """How many bytes resident memory rose above where it was: the kernel remembers the highest."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")
        self.start = status("VmRSS")
        return self

    def __exit__(self, *problem: object) -> None:
        self.extra = status("VmHWM") - self.start


def status(row: str) -> int:
    """What this process has, in bytes: VmHWM is its peak resident size (ru_maxrss would count its parent's too), VmData its own."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[row].split()[0]) << 10
