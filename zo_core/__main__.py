"""``python -m zo_core``."""

from zo_core.cli import main

main()
