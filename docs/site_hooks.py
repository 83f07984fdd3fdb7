"""Hooks of mkdocs.yml: pages of the site from files outside docs/.

- examples/*.py become pages: cells of text as text, cells of code as code;
- CHANGELOG.md and CONTRIBUTING.md become pages;
- any other file that a page links to (`../moss_audio_jax/api.py`) becomes a page that shows it;
- docs/findings/*.md get a separate section, the newest first.

Links in the Markdown work in a clone; they are converted for the site.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".sbatch": "bash",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".json": "json",
    ".cfg": "ini",
    ".md": "markdown",
}
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
_CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


def on_config(config: Any) -> None:
    findings = sorted((DOCS / "findings").glob("*.md"), reverse=True)
    if findings:
        config.nav.append({"Findings": [f"findings/{file.name}" for file in findings]})


def on_files(files: Any, *, config: Any) -> None:
    for example in sorted((ROOT / "examples").glob("*.py")):
        text = cells(example.read_text(encoding="utf-8"))
        files.append(File.generated(config, page_of(example), content=text))
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, PAGES[name], content=text))
    # Files to which those pages and the ones in docs/ link.
    shown: set[Path] = set()
    for file in [file for file in files if file.src_uri.endswith(".md")]:
        for target, _ in _LINK.findall(file.content_string):
            path = target_of(target, file.src_uri)
            if path and path.is_file() and page_of(path).startswith("source/"):
                shown.add(path)
    for path in sorted(shown):
        made = File.generated(
            config, page_of(path), content=source(path), inclusion=InclusionLevel.NOT_IN_NAV
        )
        files.append(made)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def turned(link: re.Match) -> str:
        target, anchor = link[1], link[2] or ""
        path = target_of(target, here)
        if path is None or not path.exists():
            return link[0]  # to another site, or broken, which mkdocs reports
        made = page_of(path)
        return f"]({posixpath.relpath(made, posixpath.dirname(here) or '.')}{anchor})"

    return _LINK.sub(turned, markdown)


def target_of(target: str, page: str) -> Path | None:
    """The file of a clone to which a relative link leads; None for other links."""
    if ":" in target or target.startswith("/"):
        return None
    written_in = next((ROOT / name for name, uri in PAGES.items() if uri == page), DOCS / page)
    if page.startswith("examples/"):
        written_in = ROOT / page
    path = Path(os.path.normpath(written_in.parent / target))
    return path if path.is_relative_to(ROOT) else None


def page_of(path: Path) -> str:
    """The site's path of a file of the clone."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if name.startswith("examples/") and name.endswith(".py"):
        return name.removesuffix(".py") + ".md"
    return f"source/{name}.md"


def source(path: Path) -> str:
    """A page that shows a file."""
    name = path.relative_to(ROOT).as_posix()
    code = path.read_text(encoding="utf-8")
    fence = "`" * (3 + max((len(run) for run in re.findall("`{3,}", code)), default=0))
    kind = LANGUAGES.get(path.suffix, "text")
    return f"# {name}\n\n{fence}{kind}\n{code}{fence}\n"


def cells(text: str) -> str:
    """A script with `# %%` cells as Markdown."""
    kinds = _CELL.findall(text)
    bodies = _CELL.split(text)[2::2]
    made = []
    for kind, body in zip(kinds, bodies, strict=True):
        body = body.strip("\n")
        if kind.strip() == "[markdown]":
            lines = body.splitlines()
            made.append("\n".join(re.sub(r"^# ?", "", line) for line in lines))
        elif body:
            made.append(f"```python\n{body}\n```")
    return "\n\n".join(made) + "\n"
