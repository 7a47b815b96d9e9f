"""`python -m moetrace`."""

import sys

from moetrace.cli import main

sys.exit(main())
