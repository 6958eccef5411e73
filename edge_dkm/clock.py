"""The only place that reads the wall clock. Durations use `time.monotonic`; a jump of the wall clock changes timestamps, nothing else."""

from __future__ import annotations

import ctypes
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path


def utc_now() -> datetime:
    """Now, in UTC."""
    return datetime.now(UTC)


def wall_s() -> float:
    """Seconds since 1970, for ages that must outlive a reboot."""
    return time.time()


def utc_at(mono_s: float) -> datetime:
    """The wall time of a moment of the monotonic clock, as the wall clock sees it now."""
    return utc_now() - timedelta(seconds=time.monotonic() - mono_s)


def utc_at_epoch(seconds: float) -> datetime:
    """A moment given in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC)


def rfc3339(moment: datetime) -> str:
    """`2026-11-20T23:44:01.123456Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def boot_id() -> str:
    """A word that changes with every boot of the machine; the same within one boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:12]
    except OSError:
        return f"{int(time.time() - time.monotonic()) // 60:x}"


class _Timex(ctypes.Structure):
    _fields_ = [("modes", ctypes.c_uint), ("padding", ctypes.c_byte * 508)]


def is_synced() -> bool | None:
    """Whether the kernel holds the clock to be synchronised (NTP or PTP); None where it cannot be asked."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(_Timex()))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != 5  # 5 = TIME_ERROR: not synchronised
