"""`python -m lfs_cli` is `lfs`."""

from lfs_cli.cli.app import main

if __name__ == "__main__":
    main()
