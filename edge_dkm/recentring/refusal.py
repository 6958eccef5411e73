"""Why a station is not recentred; what ran before goes on. The line of text says what is possible instead."""

from __future__ import annotations

from typing import Any, Literal

from edge_dkm.errors import EdgeError

Code = Literal["no_rows", "too_few", "too_many_novel", "identical", "uncalibrated", "golden", "false_rejects"]
Recommended = Literal["camera", "retrain", "wait", "none"]


class RefusedError(EdgeError):
    """`code` is stable. `recommended` is what to do: look at the camera, train again, wait for more parts. `figures`: what was found."""

    def __init__(
        self, code: Code, detail: str, recommended: Recommended, figures: dict[str, Any] | None = None
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.detail, self.recommended, self.figures = code, detail, recommended, figures or {}

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"code": self.code, "detail": self.detail, "recommended": self.recommended, **self.figures}
