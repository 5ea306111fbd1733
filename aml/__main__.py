"""`python -m aml` is `aml`."""

import sys

from aml.cli import main

if __name__ == "__main__":
    sys.exit(main())
