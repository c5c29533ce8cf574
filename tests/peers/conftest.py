"""Lets the tests of this folder import its modules by the names that `python -m tests.peers` knows them by."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
