"""`python -m refusion` is `refusion`."""

from refusion.cli.main import main

main()
