"""`python -m rrlhf` is the `rrlhf` command."""

from rrlhf.cli import main

main()
