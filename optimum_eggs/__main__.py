"""`python -m optimum_eggs`."""

import sys

try:
    if sys.argv[1:] and sys.argv[1] in ("autoload", "run"):
        from .cli.startup import main as start

        sys.exit(start(sys.argv[1:]))
    from .cli.main import main

    sys.exit(main())
except KeyboardInterrupt:  # while it is imported
    sys.exit(130)
