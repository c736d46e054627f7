"""A deploy target: copies a packaged model into a registry, a folder on this machine or on a shared disk.

Written on Hyperion's contract alone. For a service, replace the copying in `deploy_apply` with uploads, and ask the
service in `deploy_status` and `deploy_delete`; `deploy_check` and `deploy_render` must never touch the network.

    REGISTRY/
      MODEL-0123456789ab/       one deployment; the digits are the hash of what was sent
      .MODEL-….sending/         one that is being sent, or was interrupted
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from hyperion_core.artifact import sha256
from hyperion_core.config import PluginConfig
from hyperion_core.context import RunContext
from hyperion_core.errors import HyperionError, Problem
from hyperion_core.facts import Deployment, FileRef, PackageFacts
from hyperion_core.kinds import DeployTarget
from pydantic import Field

__all__ = ["ChangemeConfig", "ChangemeTarget"]

CARD = "deployment.json"


class ChangemeConfig(PluginConfig):
    """Options of the target. Unknown keys are refused with a suggestion."""

    type: str = "changeme"
    registry: str = Field("model-registry", min_length=1, description="The folder that holds the deployed models.")
    model: str = Field("model", pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*", description="The model's name in the registry.")


class ChangemeTarget(DeployTarget):
    """A deployment runs when its folder has its final name: that is given last, in one step."""

    config_class = ChangemeConfig

    # --- before anything is sent: no network, no torch ---

    def deploy_check(self, config: ChangemeConfig, package: PackageFacts) -> list[Problem]:
        problems = []
        if not package.files:
            problems.append(Problem("", f"the package {package.folder} holds no file", fix="package the model again"))
        if CARD in package.files:
            problems.append(Problem("", f"the package has a file {CARD}, a name that this target writes itself"))
        for name, size in package.files.items():
            path = package.folder / name
            if not path.is_file():
                problems.append(Problem("", f"{name} is not in {package.folder}", fix="package the model again"))
            elif path.stat().st_size != size:
                why = f"it has {path.stat().st_size} bytes, and {size} were packaged"
                problems.append(
                    Problem("", f"{name} is not the file that was packaged", why, "package the model again")
                )
        if Path(config.registry).is_file():
            problems.append(Problem("registry", f"{config.registry} is a file", fix="give a folder, existing or not"))
        return problems

    def deploy_render(self, config: ChangemeConfig, package: PackageFacts) -> Mapping[str, bytes | FileRef]:
        """All that will be sent. Only what the arguments say goes in: no time, no user name, no environment."""
        card = {"model": config.model, "format": package.format, "files": dict(sorted(package.files.items()))}
        files: dict[str, bytes | FileRef] = {name: FileRef(package.folder / name) for name in sorted(package.files)}
        files[CARD] = json.dumps(card, indent=2).encode()
        return files

    # --- sending ---

    def deploy_apply(
        self, config: ChangemeConfig, rendered: Mapping[str, bytes | FileRef], ctx: RunContext
    ) -> Deployment:
        """Sends file by file. An interrupted call leaves what it sent, and the next one goes on from there."""
        # The folder itself tells what has arrived. A service may not: then take a further argument, `state`, a mapping
        # whose keys survive an interruption, and keep what is needed to go on there, such as the number of an upload.
        id = f"{config.model}-{_fingerprint(rendered)[:12]}"
        final, sending = self._folders(config, id)
        if not final.is_dir():
            with ctx.progress.task(f"deploying {id}", len(rendered)) as advance:
                for name, content in rendered.items():
                    _send(content, sending / name)
                    advance(1)
            os.replace(sending, final)
        return self.deploy_status(config, id)

    def deploy_status(self, config: ChangemeConfig, id: str) -> Deployment:
        """ "deleted" is what there is nothing of, whether it ever was there or not."""
        final, sending = self._folders(config, id)
        if final.is_dir():
            return Deployment(id, final.resolve().as_uri(), "running")
        return Deployment(id, "", "pending" if sending.is_dir() else "deleted")

    def deploy_delete(self, config: ChangemeConfig, id: str) -> None:
        """First the final name goes, in one step, so that half a model never looks like a running one."""
        final, sending = self._folders(config, id)
        if final.is_dir():
            if sending.is_dir():
                shutil.rmtree(sending)
            os.replace(final, sending)
        if sending.is_dir():
            shutil.rmtree(sending)

    def _folders(self, config: ChangemeConfig, id: str) -> tuple[Path, Path]:
        """Where a deployment is, and where it is while it is being sent or deleted."""
        # An id may come from a command line: it must not lead out of the registry.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", id):
            raise HyperionError(
                f'"{id}" is no id of a deployment in {config.registry}',
                why="an id is a model's name, a dash and twelve digits of a hash",
                fix="give the id that deploying printed",
            )
        return Path(config.registry, id), Path(config.registry, f".{id}.sending")


def _fingerprint(rendered: Mapping[str, bytes | FileRef]) -> str:
    """The hash of all that is sent: the same files get the same id."""
    digests = {
        name: sha256(content.path) if isinstance(content, FileRef) else hashlib.sha256(content).hexdigest()
        for name, content in rendered.items()
    }
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _send(content: bytes | FileRef, path: Path) -> None:
    """Under another name first: a file that has its own name is whole, and need not be sent again."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    if isinstance(content, FileRef):
        shutil.copyfile(content.path, partial)
    else:
        partial.write_bytes(content)
    os.replace(partial, path)
