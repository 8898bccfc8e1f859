"""What mkdocs does beside rendering: files outside of docs/ that a page links to, and formulas as MathML.

The pages are read on a code host too, where a link such as `../CONTRIBUTING.md` leads to the file itself. In the site
that file becomes a page, or lies there as it is.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(\]\(|src=\")((?:\.\./)*)([^)#\s\"]+)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add every file of the repository that a page links to, and what those link to in turn."""
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        page = waiting.pop()
        own = page.generated_by is not None
        for _mark, up, name in _LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, own, up, name)
            if path is None or not (_ROOT / path).is_file() or files.get_file_from_path(path) is not None:
                continue
            added = File.generated(config, path, abs_src_path=str(_ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(added)
            if path.endswith(".md"):
                waiting.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, **_others: Any) -> str:
    """Links that lead out of docs/ lead to what `on_files` has put into the site."""
    if page.file.generated_by is None:  # docs/ is the root of the site, the repository's root lies beside it
        return _LINK.sub(lambda found: found[0].replace("../", "", 1) if found[2] else found[0], markdown)
    return re.sub(r"(\]\((?:\.\./)*)docs/", r"\1", markdown)


def on_page_content(content: str, **_others: Any) -> str:
    """Formulas as MathML, which browsers draw without a program from elsewhere."""

    def drawn(found: re.Match[str]) -> str:
        return convert(html.unescape(found[3]).strip(), display="inline" if found[2] == "(" else "block")

    return _FORMULA.sub(drawn, content)


def _in_repository(page: str, outside: bool, up: str, name: str) -> str | None:
    """The path in the repository of a link that leads out of docs/; None for every other one."""
    if ":" in name:
        return None
    start = Path(page).parent if outside else Path("docs") / Path(page).parent
    parts: list[str] = []
    for part in (start / (up + name)).parts:
        if part == "..":
            if not parts:
                return None
            parts.pop()
        else:
            parts.append(part)
    path = "/".join(parts)
    return None if path.startswith("docs/") else path
