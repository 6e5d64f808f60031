"""`python -m optimum_eggs`."""

import sys

from .cli.main import main

sys.exit(main())
