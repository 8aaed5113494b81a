"""MkDocs hooks that let pages link to files of the repository as a code host shows it.

A page in ``docs/`` may link to ``../CONTRIBUTING.md`` or ``../qerl_verl/config/rules.py``. Here

- :data:`PAGES`, Markdown files outside of ``docs/``, become pages of the site;
- every other file that a page links to is copied into the site under ``files/``;
- a link to a folder becomes plain text, since a site has no listing.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
    "recipes/paper/README.md": "paper-recipes.md",
}
"""Path in the repository -> page of the site. The site's start page stands for the README."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)


def source_of(page: str) -> str:
    """Returns the path in the repository of a page of the site."""
    return next((source for source, name in PAGES.items() if name == page and name != "index.md"), f"docs/{page}")


def target_of(source: str, link: str) -> str | None:
    """Returns where a relative link of a repository's file leads in the site.

    Args:
        source: path of the linking file in the repository.
        link: the link without its anchor, not empty.

    Returns:
        A path in the site, or None for a folder.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return None if (ROOT / path).is_dir() else f"files/{path}"


def _is_elsewhere(link: str) -> bool:
    return not link or "://" in link or link.startswith("mailto:")


def rewrite(markdown: str, page: str) -> str:
    """Returns the Markdown of a page with its links as the site has them, outside of code
    blocks."""

    def replace(match: re.Match) -> str:
        image, text, link, anchor = match.groups()
        if _is_elsewhere(link):
            return match[0]
        target = target_of(source_of(page), link)
        return text if target is None else f"{image}[{text}]({target}{anchor or ''})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(replace, part) for part in parts)


def linked_files(source: str, markdown: str) -> set[str]:
    """Paths in the repository of the files outside of ``docs/`` that a page links to, pages left
    out."""
    links = (match[3] for match in _LINK.finditer(markdown) if not _is_elsewhere(match[3]))
    targets = (target_of(source, link) for link in links)
    return {target.removeprefix("files/") for target in targets if target and target.startswith("files/")}


def on_files(files, config):
    """Adds the pages and files that lie outside of ``docs/``."""
    for source, page in PAGES.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    added = set()
    for file in list(files.documentation_pages()):
        added |= linked_files(source_of(file.src_uri), Path(file.abs_src_path).read_text(encoding="utf-8"))
    for path in sorted(added):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of one page."""
    return rewrite(markdown, page.file.src_uri)
