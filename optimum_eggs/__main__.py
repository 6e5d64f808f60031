"""`python -m optimum_eggs`."""

import sys

try:
    from .cli.main import main

    sys.exit(main())
except KeyboardInterrupt:  # while it is imported
    sys.exit(130)
