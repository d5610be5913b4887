"""`python -m mhc_compile`, which torchrun starts: the command `mhc-compile`."""

import sys

from mhc_compile.cli import main

sys.exit(main())
