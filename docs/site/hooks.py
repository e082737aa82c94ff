"""
Hooks of the documentation's site (mkdocs.yml). The Markdown files stay as GitHub shows them; here they fit the site:

- pages beside docs/ (the changelog, the examples ...) become pages of it;
- a link to any other file of the checkout becomes an address in the repository, and must exist;
- headings get the anchors that GitHub gives them, since the pages link to those;
- what a list item has below it is indented by its mark's width, as on GitHub, not by four spaces.
"""

import logging
import os
import re
from pathlib import Path
from typing import Final

from markdown import Markdown
from markdown.extensions import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LOG: Final = logging.getLogger("mkdocs.hooks.cascadeinfer")
"""Warnings of mkdocs' loggers are errors under --strict."""
ROOT: Final = Path(__file__).parent.parent.parent
DOCS: Final = ROOT / "docs"
BESIDE: Final = {
    ROOT / "CHANGELOG.md": "project/changelog.md",
    ROOT / "CONTRIBUTING.md": "project/contributing.md",
    ROOT / "SECURITY.md": "project/security.md",
    ROOT / "examples" / "README.md": "project/examples.md",
}
"""Pages outside docs/, with their place in the site."""
LINK: Final = re.compile(r"(?<=\]\()(?!https?://|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE: Final = re.compile(r"^( *```.*?^ *```)", flags=re.MULTILINE | re.DOTALL)


def github_anchor(heading: str, separator: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


class ShortIndents(Extension):
    """Two spaces, or three, suffice to belong to a list item. Must come first: it makes the block parser anew."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - Markdown's name
        """Called by Markdown."""
        md.tab_length = 2
        md.build_parser()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors and lists as on GitHub."""
    config.markdown_extensions.insert(0, ShortIndents())  # type: ignore[arg-type] - it may be an object
    config.mdx_configs.setdefault("toc", {})["slugify"] = github_anchor
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie beside docs/."""
    for path, place in BESIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - mkdocs' names
    """Rewrite the links of a page, those in code excepted."""
    source = Path(page.file.abs_src_path or "")
    repository = (config.repo_url or "").rstrip("/")
    parts = FENCE.split(markdown)

    def rewritten(match: re.Match[str]) -> str:
        return _target(match[1], source, page.file.src_uri, repository) + (match[2] or "")

    return "".join(part if part.lstrip(" ").startswith("```") else LINK.sub(rewritten, part) for part in parts)


def _target(link: str, source: Path, place: str, repository: str) -> str:
    """Where a link of a page leads in the site: to another page, or to a file in the repository."""
    path = (source.parent / link).resolve()
    if path in BESIDE:
        return os.path.relpath(BESIDE[path], Path(place).parent)
    if path.is_relative_to(DOCS) and path.suffix != ".py" and not path.is_dir():
        return os.path.relpath(path.relative_to(DOCS), Path(place).parent)
    if not path.exists():
        LOG.warning("%s: the link %s leads nowhere", place, link)
    return f"{repository}/{'tree' if path.is_dir() else 'blob'}/main/{path.relative_to(ROOT)}"
