"""What can go wrong in training, as far as the command line acts differently on it.

TrainerError            exit 1   failure
├── DataError           exit 2   images that are not there, unreadable, or too few for the settings
├── ArtifactError       exit 3   a folder that is not a usable run
└── CollapseError       exit 1   a guard stopped the training; the last good checkpoint is kept
"""

from __future__ import annotations


class TrainerError(Exception):
    """Base of this package's errors."""

    exit_code = 1


class DataError(TrainerError):
    """The images do not fit what the settings ask for."""

    exit_code = 2


class ArtifactError(TrainerError):
    """A run folder that is missing, incomplete or damaged."""

    exit_code = 3


class CollapseError(TrainerError):
    """Training went wrong in a way that more epochs will not mend. `guard` names the one that spoke."""

    def __init__(self, guard: str, message: str) -> None:
        super().__init__(f"{guard}: {message}")
        self.guard = guard
