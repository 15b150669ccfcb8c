"""Run the command line as `python -m bridgework.cli`."""

from bridgework.cli import main

if __name__ == "__main__":
    main()
