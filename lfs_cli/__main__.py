"""`lfs` and `python -m lfs_cli`: imports the rest where Ctrl-C ends it without a word."""

import sys


def main() -> None:
    """Run `lfs` with the arguments of this process."""
    try:
        from lfs_cli.cli.app import main as run

        run()
    except KeyboardInterrupt:  # while modules were imported: from then on the app answers itself
        sys.exit(130)


if __name__ == "__main__":
    main()
