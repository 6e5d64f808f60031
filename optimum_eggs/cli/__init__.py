"""The command line: `optimum-cli eggs …`, or `python -m optimum_eggs …`. One file a subcommand."""
