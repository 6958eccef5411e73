"""What can go wrong on the device side, as the caller has to tell it apart.

DeviceError
├── CameraError     a camera or its settings: exit code 4
└── ProviderError   an execution provider that is not installed: exit code 2
"""

from __future__ import annotations


class DeviceError(Exception):
    """Base of this package's errors."""

    exit_code = 1


class CameraError(DeviceError):
    """A camera that cannot be opened or read. `code` is stable (C-NODEV, C-LOST, C-STALL), the text is for people."""

    exit_code = 4

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code} {message}")
        self.code, self.detail = code, message


class ProviderError(DeviceError):
    """A device profile asks for an execution provider that this machine does not have."""

    exit_code = 2
