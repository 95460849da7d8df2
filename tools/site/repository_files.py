"""Files outside docs/ that pages link to: README and the like become pages, and other files pages that show them.

Links are written for the repository's own web view, relative to the file that holds them. Here they are resolved there
and rewritten to the page or file of the site that shows the same. A link to nothing is left as it is, so that
`mkdocs build --strict` refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

# Pages of the repository's root -> their names among the site's sources.
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
}
# Suffixes of files that are shown as text -> the language to highlight them in. Other files are copied.
LANGUAGES = {
    "": "text",
    ".cfg": "text",
    ".conf": "nginx",
    ".json": "json",
    ".py": "python",
    ".toml": "toml",
    ".txt": "text",
    ".yaml": "yaml",
    ".yml": "yaml",
}
_LINK = re.compile(r"\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
_FENCED = re.compile(r"(?ms)^(```|~~~).*?^\1")

# Path in the repository -> path among the site's sources, and the other way for pages that hold links.
_shown: dict[str, str] = {}
_written_as: dict[str, str] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    docs = Path(config.docs_dir).relative_to(root)
    _shown.clear()
    _shown.update({(docs / file.src_uri).as_posix(): file.src_uri for file in files if file.generated_by is None})
    for path, src_uri in ROOT_PAGES.items():
        files.append(File.generated(config, src_uri, abs_src_path=str(root / path)))
        _shown[path] = src_uri
    unread = [path for path in _shown if path.endswith(".md")]
    while unread:
        page = unread.pop()
        for target in _linked_files(root, page):
            if target not in _shown:
                file = _file(config, root, target)
                files.append(file)
                _shown[target] = file.src_uri
                if target.endswith(".md"):
                    unread.append(target)
    _written_as.clear()
    _written_as.update({src_uri: path for path, src_uri in _shown.items() if path.endswith(".md")})
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    written_as = _written_as.get(page.file.src_uri)
    if written_as is None:
        return markdown
    here = posixpath.dirname(page.file.src_uri) or "."

    def on_the_site(link: re.Match[str]) -> str:
        shown = _shown.get(_target(written_as, link))
        return link[0] if shown is None else f"]({posixpath.relpath(shown, here)}{link['anchor'] or ''})"

    parts: list[str] = []
    end = 0
    for fenced in _FENCED.finditer(markdown):
        parts += [_LINK.sub(on_the_site, markdown[end : fenced.start()]), fenced[0]]
        end = fenced.end()
    return "".join([*parts, _LINK.sub(on_the_site, markdown[end:])])


def _linked_files(root: Path, page: str) -> list[str]:
    """Files of the repository that `page` links to."""
    text = _FENCED.sub("", (root / page).read_text("utf-8"))
    targets = {_target(page, link) for link in _LINK.finditer(text)}
    return sorted(target for target in targets if not target.startswith("..") and (root / target).is_file())


def _target(page: str, link: re.Match[str]) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link["target"]))


def _file(config: MkDocsConfig, root: Path, path: str) -> File:
    language = LANGUAGES.get(Path(path).suffix)
    if path.endswith(".md") or language is None:
        content, src_uri = (root / path).read_bytes(), f"files/{path}"
    else:
        text = (root / path).read_text("utf-8")
        content, src_uri = f"# {path}\n\n~~~~~~{language}\n{text}\n~~~~~~\n".encode(), f"files/{path}.md"
    return File.generated(config, src_uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
