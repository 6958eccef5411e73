"""x_sdd, fitted on one half and scored on the half never seen: k-means and smoothed k-means, five seeds, the choice made without labels."""

from __future__ import annotations

import argparse

from benchmarks.accuracy.factory_sets import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="also fit and predict from files")
    arguments = parser.parse_args()
    report("x_sdd", arguments.seeds, arguments.check)


if __name__ == "__main__":
    main()
