"""Release checks: the oldest tested versions, the changelog, and the README as an index shows it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.version import Version

import effnet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_oldest_versions_are_those_that_pyproject_allows() -> None:
    extras = PROJECT["optional-dependencies"]
    named = [text for extra in extras if extra not in ("dev", "docs") for text in extras[extra]] + PROJECT[
        "dependencies"
    ]
    lowest = {
        requirement.name: Version(bound.version)
        for requirement in map(Requirement, named)
        for bound in requirement.specifier
        if bound.operator in (">=", "==")
    }
    text = (ROOT / "constraints-oldest.txt").read_text()
    assert {name: Version(version) for name, version in re.findall(r"^([\w-]+)==(.+)$", text, re.MULTILINE)} == lowest


def test_the_changelog_knows_this_version() -> None:
    assert re.search(
        rf"^## \[(Unreleased|{re.escape(effnet.__version__)})\]", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_an_index_shows_the_pictures_and_links_of_the_readme() -> None:
    written, shown = (ROOT / "README.md").read_text("utf-8"), ProjectMetadata(str(ROOT), PluginManager()).core.readme
    pointed = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", written)
    assert len([target for picture, target in pointed if picture]) >= 2
    for picture, target in pointed:
        host = "https://raw.githubusercontent.com/effnet/effnet" if picture else f"{PROJECT['urls']['Homepage']}/blob"
        before, after = f"]({target})", f"]({host}/v{effnet.__version__}/{target})"
        if not target.startswith("https:"):
            assert before not in shown
            assert shown.count(after) == written.count(before), target
    assert len(re.findall(r"\]\((?!https:)", shown)) == 0
