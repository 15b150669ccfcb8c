"""`python -m bridgework.cli`: the same as the console script."""

from bridgework.cli import main

main()
