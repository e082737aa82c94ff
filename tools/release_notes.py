"""
Prints the section of CHANGELOG.md that describes a release, for its page; refuses a tag that is not the version.

    python tools/release_notes.py v0.1.0

Runs with nothing installed, before anything is built.
"""

import re
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
EXIT_USAGE: Final = 2


class NotReadyError(Exception):
    """The tag cannot be released as the checkout stands."""


def version_of(source: str) -> str:
    """The version that the package's `__init__.py` declares."""
    found = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if found is None:
        raise NotReadyError("src/cascadeinfer/__init__.py declares no __version__")
    return found.group(1)


def section_of(changelog: str, version: str) -> str:
    """
    What the changelog says of a version, without its heading.

    Raises:
        NotReadyError: There is no section `## [VERSION] - YYYY-MM-DD`, or it is empty.
    """
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$"
    found = re.search(heading + r"\n(.*?)(?=^## |^\[|\Z)", changelog, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        raise NotReadyError(f"CHANGELOG.md has no section `## [{version}] - YYYY-MM-DD`")
    text = found.group(1).strip()
    if not text:
        raise NotReadyError(f"the section of {version} in CHANGELOG.md is empty")
    return text


def notes(tag: str, source: str, changelog: str) -> str:
    """
    The notes of a tag.

    Raises:
        NotReadyError: The tag is not `v` and the package's version, or the changelog does not describe it.
    """
    version = version_of(source)
    if tag != f"v{version}":
        raise NotReadyError(f"the tag is {tag}, but src/cascadeinfer/__init__.py says {version} (tag v{version})")
    return section_of(changelog, version)


def main(arguments: list[str]) -> int:
    """Print them; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python tools/release_notes.py TAG", file=sys.stderr)
        return EXIT_USAGE
    source = (ROOT / "src" / "cascadeinfer" / "__init__.py").read_text(encoding="utf-8")
    try:
        print(notes(arguments[0], source, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    except NotReadyError as error:
        print(f"release_notes: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
