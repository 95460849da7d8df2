"""`python -m eldr`, the same as the command `eldr`."""

import sys

from eldr.cli.main import main

sys.exit(main())
