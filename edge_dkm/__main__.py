"""`python -m edge_dkm`: the same as `edge-dkm`."""

import sys

from edge_dkm.cli import main

sys.exit(main())
