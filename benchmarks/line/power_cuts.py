"""Power cuts under the outbox: random moments, each unsynced sector kept or lost by chance; and what weaker settings would lose.

python -m benchmarks.line.power_cuts [--cuts 10000] [--seed 1]
"""

from __future__ import annotations

import argparse
import logging
import time

from benchmarks.table import show_table
from tests.faults.power_cut import cut_repeatedly

SETTINGS = {
    "FULL (the outbox)": None,
    "control: NORMAL": {"PRAGMA synchronous=FULL": "PRAGMA synchronous=NORMAL"},
    "control: OFF": {"PRAGMA synchronous=FULL": "PRAGMA synchronous=OFF"},
}
CONTROL_CUTS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cuts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    rows = []
    for name, instead in SETTINGS.items():
        started_s = time.monotonic()
        cuts = arguments.cuts if instead is None else min(arguments.cuts, CONTROL_CUTS)
        tally = cut_repeatedly(cuts, arguments.seed, instead)
        rows.append(
            [
                name,
                tally.cuts,
                tally.committed,
                tally.lost,
                tally.cuts_with_loss,
                tally.undone,
                tally.unusable,
                f"{time.monotonic() - started_s:.0f}",
            ]
        )
    header = [
        "synchronous",
        "cuts",
        "committed rows",
        "lost",
        "cuts with a loss",
        "acknowledgements undone",
        "files unusable",
        "s",
    ]
    show_table(f"Power cuts, seed {arguments.seed}", header, rows)


if __name__ == "__main__":
    main()
