"""What can go wrong on the edge, as far as a caller acts differently on it. The command line maps each to its exit code.

    EdgeError                    exit 1   failure
    ├── UsageError               exit 2   arguments or settings, also what is not built yet
    ├── ModelError               exit 3   a file that is not a usable model
    │   ├── ContractError        exit 3   a model, but not of the contract this runtime speaks
    │   └── ParityError          exit 3   the golden images do not give the golden answers on this device
    ├── InspectionError          exit 1   one frame got no answer; `code` is stable (R-NONFINITE, R-RUNTIME)
    │   └── FrameError           exit 1   a frame the graph cannot take (F-DTYPE, F-SHAPE, F-DECODE)
    ├── BrokerError              exit 5   the MQTT broker
    ├── LockedError              exit 6   another process holds the state folder
    └── StorageError             exit 7   the state folder or its database

(configs.ConfigError: exit 2; devices.CameraError: exit 4; devices.ProviderError: exit 2.)
"""

from __future__ import annotations


class EdgeError(Exception):
    """Base of this package's errors."""

    exit_code = 1


class UsageError(EdgeError):
    """Arguments that do not fit together."""

    exit_code = 2


class ModelError(EdgeError):
    """A file that is not a usable model."""

    exit_code = 3


class ContractError(ModelError):
    """A model of another contract, or one whose inputs, outputs or metadata are not those of the contract."""


class ParityError(ModelError):
    """The golden images give other answers here than where the model was exported."""


class InspectionError(EdgeError):
    """One frame got no answer; the next one may. `code` is for machines, the text for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code} {message}")
        self.code, self.detail = code, message


class FrameError(InspectionError):
    """A frame that the graph cannot take."""


class BrokerError(EdgeError):
    """The MQTT broker cannot be reached or refuses us; `code` (M-...) is that of the alarm."""

    exit_code = 5

    def __init__(self, message: str, code: str = "M-OFFLINE") -> None:
        super().__init__(message)
        self.code = code


class LockedError(EdgeError):
    """Another process holds the state folder."""

    exit_code = 6


class StorageError(EdgeError):
    """The state folder cannot be used: no space, no permission, a damaged database."""

    exit_code = 7
