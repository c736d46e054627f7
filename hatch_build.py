"""What hatchling does with the metadata of `hyperion-ft`."""

from __future__ import annotations

import os
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReleaseLinks(MetadataHookInterface):
    """Puts version ranges in place of the links to this checkout when HYPERION_RELEASE=1 asks for a release.

    That is for wheels. A source archive is the whole checkout, and links within itself as the checkout does.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        if os.environ.get("HYPERION_RELEASE") != "1":
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
