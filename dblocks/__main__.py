"""`python -m dblocks` is the command `dblocks`."""

import sys

from dblocks.cli import main

sys.exit(main())
