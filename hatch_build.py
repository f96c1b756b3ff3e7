"""Fills the metadata that depends on the address of the repository: the project's URLs and the links of the README.

pyproject.toml holds the address once, as ``repository`` in ``[tool.hatch.metadata.hooks.custom]``. Relative links work
where the README is beside the files, but not on a package index.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE_LINK = re.compile(r"(!?)\[([^\]]+)\]\((?![a-z]+:|#)([^)]+)\)")


def with_absolute_links(readme: str, repository: str) -> str:
    """Returns the README with absolute links or, without an address, with paths instead of links and images."""

    def replacement(link: re.Match[str]) -> str:
        image, text, path = link.groups()
        if repository:
            return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/HEAD/{path})"
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    return RELATIVE_LINK.sub(replacement, readme)


def urls(repository: str) -> dict[str, str]:
    """Returns the project's URLs; none without an address."""
    if not repository:
        return {}
    return {
        "Repository": repository,
        "Documentation": f"{repository}/tree/HEAD/docs",
        "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


class RepositoryMetadata(MetadataHookInterface):
    """Sets ``readme`` and ``urls``, which pyproject.toml declares as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds both fields to ``metadata``."""
        repository = self.config["repository"].rstrip("/")
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": with_absolute_links(readme, repository),
        }
        metadata["urls"] = urls(repository)
