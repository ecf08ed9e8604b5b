"""`python -m gpurnn` is the command `gpurnn`."""

import sys

from gpurnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
