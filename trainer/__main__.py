"""`python -m trainer` and `torchrun -m trainer`: the same as `dkm-train`."""

import sys

from trainer.cli import main

sys.exit(main())
