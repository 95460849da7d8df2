"""`python -m eldr`, the same as the command `eldr`."""

import sys

from eldr.cli import main

sys.exit(main())
