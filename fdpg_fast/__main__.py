"""`python -m fdpg_fast` is `fdpg`."""

import sys

from fdpg_fast.cli import main

sys.exit(main())
