"""`python -m eldr.demo`: the same as `eldr demo`."""

import sys

from eldr.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
