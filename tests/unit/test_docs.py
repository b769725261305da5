"""The documentation and the tree say the same."""

from __future__ import annotations

import re
from pathlib import Path

from buffer.keys import KEYS

ROOT = Path(__file__).parents[2]
PACKAGES = ("buffer", "weightsync", "actors", "learner", "launch")


def listed() -> set[str]:
    """Files of the README's tree, one a line, indented by folder."""
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    folders: list[str] = []
    found = set()
    for indent, name in re.findall(r"^    ( *)(\S+) ", tree, re.MULTILINE):
        folders[len(indent) // 2 :] = []
        if name.endswith("/"):
            folders.append(name.strip("/"))
        else:
            found.add("/".join([*folders, name]))
    return found


def test_every_file_stands_in_the_readme() -> None:
    tracked = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.*")}
    files = {path for path in tracked if not path.endswith(("__init__.py", ".pyc"))}
    assert listed() == files


def test_the_table_of_keys_is_the_code() -> None:
    rows = [
        f"| `{{run}}:{row.name}` | {row.type} | {row.owner} | {row.lifetime} | {row.holds} |" for row in KEYS
    ]
    assert (ROOT / "docs/redis.md").read_text().endswith("\n".join(rows) + "\n")


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
