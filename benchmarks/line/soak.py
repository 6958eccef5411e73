"""A station that runs and runs, the broker away half of the time: memory, disk, files and threads must stay where they are."""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.line.outage import Site, site
from benchmarks.table import show_table

CAP_MB = 20  # small, so that a run of minutes reaches it
RATE_HZ = 200.0
EVERY_S = 1.0
GROWTH_ASKED_MB = 2.0
FILE_FACTOR = 1.5  # of the database, to what its rows hold: indexes, half-full pages


@dataclass(frozen=True)
class Sample:
    """Of the station's process, and the bytes of its outbox with all that belongs to it."""

    at_s: float
    rss_mb: float
    files: int
    threads: int
    disk_mb: float


def sample(place: Site, started_s: float) -> Sample:
    """Now."""
    process = Path(f"/proc/{place.pid('station')}")
    status = (process / "status").read_text()
    rss_kb, threads = (int(re.search(rf"^{key}:\s+(\d+)", status, re.MULTILINE)[1]) for key in ("VmRSS", "Threads"))  # type: ignore[index]
    disk = sum(path.stat().st_size for path in place.folder.glob("outbox.db*"))
    files = len(list((process / "fd").iterdir()))
    return Sample(time.monotonic() - started_s, rss_kb / 1024, files, threads, disk / 1e6)


def soak(minutes: float, away_s: float) -> tuple[list[Sample], list[object], bool]:
    """Samples; what the oracle says of the delivery, as cells; whether it is as promised."""
    with site("journal", f", max_mb: {CAP_MB}") as place:
        place.start_consumer()
        place.start_station(int(minutes * 60 * RATE_HZ), RATE_HZ)
        started_s, samples = time.monotonic(), list[Sample]()
        is_away = False
        while time.monotonic() - started_s < minutes * 60:
            wanted = int((time.monotonic() - started_s) / away_s) % 2 == 1
            if wanted != is_away:
                is_away = wanted
                place.broker.kill() if is_away else place.broker.start()
            time.sleep(EVERY_S)
            samples.append(sample(place, started_s))
        if is_away:
            place.broker.start()
        place.wait_settled()
        place.stop_station()
        verdict = place.verdict()
    cells: list[object] = [verdict.produced, verdict.received, verdict.declared, len(verdict.lost)]
    return samples, cells, verdict.is_kept


def between(samples: list[Sample], from_s: float, to_s: float) -> Sample:
    """Medians of a stretch; of files, threads and disk the most."""
    chosen = [one for one in samples if from_s <= one.at_s <= to_s] or samples[-1:]
    rss = float(np.median([one.rss_mb for one in chosen]))
    most = [max(getattr(one, key) for one in chosen) for key in ("files", "threads", "disk_mb")]
    return Sample(to_s, rss, int(most[0]), int(most[1]), float(most[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--away", type=float, default=30.0, help="seconds that the broker is away, and is there, in turn"
    )
    arguments = parser.parse_args()
    samples, delivered, is_kept = soak(arguments.minutes, arguments.away)
    end_s = arguments.minutes * 60
    stretch_s = min(2 * arguments.away, end_s / 3)  # a whole turn
    early, late = between(samples, end_s / 3 - stretch_s, end_s / 3), between(samples, end_s - stretch_s, end_s + 60)
    growth_mb = late.rss_mb - early.rss_mb
    disk_mb = max(one.disk_mb for one in samples)
    rows: list[list[object]] = [
        ["RSS, MB", early.rss_mb, late.rss_mb, f"growth {growth_mb:.2f} < {GROWTH_ASKED_MB:g}"],
        ["open files", early.files, late.files, "flat"],
        ["threads", early.threads, late.threads, "flat"],
        ["outbox on disk, MB", early.disk_mb, late.disk_mb, f"<= {FILE_FACTOR * CAP_MB:g} (cap {CAP_MB})"],
    ]
    title = (
        f"soak: {arguments.minutes:g} minutes at {RATE_HZ:g} results/s, broker away every other {arguments.away:g} s"
    )
    show_table(title, ["what", f"minute {end_s / 180:g}", f"minute {arguments.minutes:g}", "asked"], rows)
    show_table("delivery", ["produced", "received", "declared", "lost", "kept"], [[*delivered, is_kept]])
    flat = late.files <= early.files + 2 and late.threads <= early.threads
    good = is_kept and growth_mb < GROWTH_ASKED_MB and flat and disk_mb <= FILE_FACTOR * CAP_MB
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
