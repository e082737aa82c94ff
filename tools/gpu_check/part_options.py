"""The command line that the parts of the GPU check have in common."""

import argparse
from pathlib import Path


def options_of(description: str | None) -> argparse.Namespace:
    """Parse it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--rows", type=Path, required=True, help="file of rows; those in it are not measured again")
    parser.add_argument("--logs", type=Path, default=Path(), help="folder for the output of servers")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for this part")
    return parser.parse_args()
