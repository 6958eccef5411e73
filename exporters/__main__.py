"""`python -m exporters`: the same as `dkm-export`."""

import sys

from exporters.cli import main

sys.exit(main())
