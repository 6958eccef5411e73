"""report.html of a run: one file that opens offline."""

from trainer.report.page import write_report

__all__ = ["write_report"]
