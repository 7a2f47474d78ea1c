"""Memory of a process, in MiB, from Linux's /proc.

`resource.getrusage` is no substitute: a child process inherits the peak of its parent there.
"""

from pathlib import Path


def peak_memory() -> float:
    """Peak resident memory of this process."""
    return _status("VmHWM")


def resident_memory(pid: int | str = "self") -> float:
    """Current resident memory of a process."""
    return _status("VmRSS", pid)


def reset_peak_memory() -> None:
    """Restart the peak of this process at its current resident memory."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str, pid: int | str = "self") -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024
