"""What hatchling does with the metadata of `hyperion-ft`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReleaseLinks(MetadataHookInterface):
    """Puts version ranges in place of the links to this checkout when a release is built.

    A release is a build with HYPERION_RELEASE=1 in its environment, or one from a source archive, which has no
    sibling distributions to link to.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        if os.environ.get("HYPERION_RELEASE") != "1" and not Path(self.root, "PKG-INFO").is_file():
            return
        ranges = {requirement.partition(">=")[0]: requirement for requirement in self.config["released"]}

        def released(requirement: str) -> str:
            target, is_link, _ = requirement.partition(" @ ")
            if not is_link:
                return requirement
            name, bracket, extras = target.partition("[")
            return ranges[name].replace(name, name + bracket + extras, 1)

        metadata["dependencies"] = [released(requirement) for requirement in metadata["dependencies"]]
        metadata["optional-dependencies"] = {
            extra: [released(requirement) for requirement in requirements]
            for extra, requirements in metadata["optional-dependencies"].items()
        }
