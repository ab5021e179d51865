"""``python -m styleforge``: the same as the ``styleforge`` command."""

from styleforge.cli import main

if __name__ == "__main__":
    main()
