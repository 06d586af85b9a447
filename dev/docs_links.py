"""
Links of the vault `obsidian/`: where they lead, and what they become on the site. A hook of MkDocs, see mkdocs.yml.

A page links to another as Obsidian does, [[Name]], [[Name#Heading]] or [[Name|text]], and to files of the repository
by a path relative to itself. On the site the former are links between pages, the latter links to the repository.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

ROOT = Path(__file__).resolve().parent.parent
VAULT = ROOT / "obsidian"
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
WIKILINK = re.compile(r"\[\[(?P<page>[^\]|#]*)(?:#(?P<heading>[^\]|]+))?(?:\|(?P<text>[^\]]+))?\]\]")
LINK = re.compile(r"(?P<before>\[[^\]]*\]\()(?P<target>[^)\s]+)(?P<after>\))")


@dataclass(frozen=True)
class Target:
    """What a link of a page names: a path, which need not exist, and a heading there, "" for none."""

    path: Path
    heading: str = ""


def pages() -> dict[str, Path]:
    """Name → path of every page. Raises ValueError when two have one name, so that a wikilink could mean either."""
    found = {}
    for path in sorted(VAULT.rglob("*.md")):
        if path.stem in found:
            raise ValueError(f"two pages are named {path.stem!r}: {found[path.stem]} and {path}")
        found[path.stem] = path
    return found


def prose(text) -> str:
    """The text without its code."""
    return "".join(CODE.split(text)[::2])


def slug(heading) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def headings(text) -> set[str]:
    """Anchors of a page."""
    return {slug(line.lstrip("#").replace("`", "")) for line in CODE.sub(_inline, text).splitlines() if line[:1] == "#"}


def _inline(match):
    return "" if match[0].startswith("```") else match[0]


def wikilink_target(match, page: Path) -> Target:
    """Of a match of WIKILINK on a page; an unknown name is a path that does not exist."""
    name = match["page"].strip()
    return Target(pages().get(name, VAULT / f"{name}.md") if name else page, match["heading"] or "")


def link_target(target: str, page: Path) -> Target | None:
    """Of a Markdown link; None when it leads out of the repository."""
    if re.match(r"[a-z]+:", target):
        return None
    path, _, heading = unquote(target).partition("#")
    return Target((page.parent / path).resolve() if path else page, heading)


def for_site(text, page: Path, repository: str) -> str:
    """The text of a page with links as MkDocs takes them. repository: its address, for files that are no pages."""

    def wikilink(match):
        target = wikilink_target(match, page)
        path = quote(_relative(target.path, page))
        return f"[{match['text'] or match['page'] or target.heading}]({path}{_anchor(target)})"

    def link(match):
        target = link_target(match["target"], page)
        if target is None or target.path.is_relative_to(VAULT):
            return match[0]
        kind = "tree" if target.path.is_dir() else "blob"
        address = f"{repository.rstrip('/')}/{kind}/main/{quote(target.path.relative_to(ROOT).as_posix())}"
        return f"{match['before']}{address}{_anchor(target)}{match['after']}"

    parts = CODE.split(text)
    parts[::2] = [LINK.sub(link, WIKILINK.sub(wikilink, part)) for part in parts[::2]]
    return "".join(parts)


def _anchor(target):
    return f"#{slug(target.heading)}" if target.heading else ""


def _relative(path, page):
    return Path(os.path.relpath(path, page.parent)).as_posix()


def on_page_markdown(markdown, page, config, files):
    """Called by MkDocs for every page."""
    return for_site(markdown, VAULT / page.file.src_uri, config.repo_url)
