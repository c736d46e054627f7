"""The deploy target suite passes an honest target, and names the fault of a broken one."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.config import PluginConfig
from hyperion_core.errors import HyperionError, Problem
from hyperion_core.facts import Deployment, FileRef, PackageFacts
from hyperion_core.hooks import RunHooks
from hyperion_core.kinds import DeployTarget
from hyperion_core.registry import Registry
from hyperion_core.testing import DeployTargetConformance
from hyperion_core.testing.adapters import context
from hyperion_core.testing.planning import planning
from hyperion_core.testing.side_effects import Interrupted, side_effects


class ShelfConfig(PluginConfig):
    type: str = "shelf"
    folder: str = "shelf"


class Shelf(DeployTarget):
    """Honest: copies to a folder. The broken ones below each change one thing."""

    config_class = ShelfConfig

    def deploy_check(self, package: PackageFacts) -> list[Problem]:
        gone = [name for name in package.files if not (package.folder / name).is_file()]
        return [Problem("", "the package is incomplete")] if gone or not package.files else []

    def deploy_render(self, config: Any, package: PackageFacts) -> Mapping[str, bytes | FileRef]:
        return {"card.txt": b"a model\n", **{name: FileRef(package.folder / name) for name in package.files}}

    def deploy_apply(self, config: Any, rendered: Any, state: Any, ctx: Any) -> Deployment:
        final, sending = self.folders(config, "model")
        if not final.is_dir():
            for name, content in rendered.items():
                self.send(content, sending / name)
            os.replace(sending, final)
        return self.deploy_status(config, "model")

    def deploy_status(self, config: Any, id: str) -> Deployment:
        final, sending = self.folders(config, id)
        state = "running" if final.is_dir() else "pending" if sending.is_dir() else "deleted"
        return Deployment(id, final.resolve().as_uri() if state == "running" else "", state)

    def deploy_delete(self, config: Any, id: str) -> None:
        for folder in self.folders(config, id):
            shutil.rmtree(folder, ignore_errors=True)

    def folders(self, config: Any, id: str) -> tuple[Path, Path]:
        if not id.replace("-", "").isalnum():
            raise HyperionError(f"{id!r} is no id")
        return Path(config.folder, id), Path(config.folder, f".{id}")

    def send(self, content: bytes | FileRef, path: Path) -> None:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(content if isinstance(content, bytes) else content.path.read_bytes())
            os.replace(partial, path)


class TestAnHonestTarget(DeployTargetConformance):
    plugin = "shelf"

    @pytest.fixture(autouse=True)
    def _registered(self, registry: Registry) -> None:
        registry.add(Shelf, "shelf")


# --- checking ---


class RefusesEverything(Shelf):
    def deploy_check(self, package: PackageFacts) -> list[Problem]:
        return [Problem("", "not today")]


class ChecksWithTorch(Shelf):
    def deploy_check(self, package: PackageFacts) -> list[Problem]:
        import torch

        return [] if torch.__version__ else [Problem("", "no torch")]


class ChecksOverTheNetwork(Shelf):
    def deploy_check(self, package: PackageFacts) -> list[Problem]:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", 9), timeout=0.01).close()
        return super().deploy_check(package)


class ChecksNothing(Shelf):
    def deploy_check(self, package: PackageFacts) -> list[Problem]:
        return []


class AnswersWithText(Shelf):
    def deploy_check(self, package: PackageFacts) -> Any:
        return [str(problem) for problem in super().deploy_check(package)]


class BlamesAnOptionItHasNot(Shelf):
    def deploy_check(self, package: PackageFacts) -> list[Problem]:
        return [replace(problem, path="bucket.name") for problem in super().deploy_check(package)]


# --- rendering ---


class Adds(Shelf):
    """Renders further files, those that `more` gives."""

    def deploy_render(self, config: Any, package: PackageFacts) -> Mapping[str, bytes | FileRef]:
        return {**super().deploy_render(config, package), **self.more(package)}

    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {}


class RendersARandomNumber(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {"id.txt": uuid.uuid4().bytes}


class WritesWhileRendering(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        Path("card.txt").write_text("a model\n")
        return {}


class ChangesThePackage(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        (package.folder / "card.txt").write_text("a model\n")
        return {}


class RendersOverTheNetwork(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            asked.connect(("127.0.0.1", 9))
        return {}


class RendersWithTorch(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        import torch

        return {"torch.txt": torch.__version__.encode()}


class RendersNothing(Shelf):
    def deploy_render(self, config: Any, package: PackageFacts) -> Mapping[str, bytes | FileRef]:
        return {}


class LeadsOutside(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {"weights/../../card.txt": b"a model\n"}


class StartsAtTheRoot(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {"/etc/card.txt": b"a model\n"}


class RefersOutside(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {"card.txt": FileRef(Path(__file__))}


class RefersToNothing(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {"card.txt": FileRef(package.folder / "no-such-file")}


class RendersText(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {"card.txt": "a model\n"}


class ReadsLargeFiles(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {name: (package.folder / name).read_bytes() for name in package.files}


class SendsTheEnvironment(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {"environment.txt": "\n".join(os.environ.values()).encode()}


class SendsItsToken(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {"settings.txt": os.environ.get("SHELF_TOKEN", "").encode()}


class TellsWhereThePackageLay(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {"source.txt": str(package.folder).encode()}


class TellsTheDay(Adds):
    def more(self, package: PackageFacts) -> dict[str, Any]:
        return {"day.txt": time.strftime("%Y-%m-%d", time.gmtime(time.time())).encode()}


# --- sending ---


class AnswersWithAnId(Shelf):
    def deploy_apply(self, config: Any, rendered: Any, state: Any, ctx: Any) -> Any:
        return super().deploy_apply(config, rendered, state, ctx).id


class HasNoId(Shelf):
    def deploy_apply(self, config: Any, rendered: Any, state: Any, ctx: Any) -> Deployment:
        return replace(super().deploy_apply(config, rendered, state, ctx), id="")


class TellsOfAnother(Shelf):
    def deploy_status(self, config: Any, id: str) -> Deployment:
        return replace(super().deploy_status(config, "model"), id="model-1" if id == "model" else id)

    def deploy_apply(self, config: Any, rendered: Any, state: Any, ctx: Any) -> Deployment:
        return replace(super().deploy_apply(config, rendered, state, ctx), id="model")


class HasNoAddress(Shelf):
    def deploy_status(self, config: Any, id: str) -> Deployment:
        return replace(super().deploy_status(config, id), url="")


class Fails(Shelf):
    def deploy_status(self, config: Any, id: str) -> Deployment:
        return replace(super().deploy_status(config, id), state="failed")


class LosesAFile(Shelf):
    def deploy_apply(self, config: Any, rendered: Any, state: Any, ctx: Any) -> Deployment:
        return super().deploy_apply(config, {k: v for k, v in rendered.items() if k != "config.json"}, state, ctx)


class RunsBeforeItIsThere(Shelf):
    """Sends to the final folder at once."""

    def deploy_apply(self, config: Any, rendered: Any, state: Any, ctx: Any) -> Deployment:
        for name, content in rendered.items():
            self.send(content, self.folders(config, "model")[0] / name)
        return self.deploy_status(config, "model")


class TrustsHalfAFile(Shelf):
    """Writes a file under its own name, and takes one that is there for whole."""

    def send(self, content: bytes | FileRef, path: Path) -> None:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.path.read_bytes())


class CountsBeforeItSends(Shelf):
    """Keeps in its state what was sent, a file too early."""

    def deploy_apply(self, config: Any, rendered: Any, state: Any, ctx: Any) -> Deployment:
        final, sending = self.folders(config, "model")
        sending.mkdir(parents=True, exist_ok=True)
        for number, (name, content) in enumerate(rendered.items()):
            if number >= state.get("sent", 0):
                state["sent"] = number + 1
                self.send(content, sending / name)
        if not final.is_dir():
            os.replace(sending, final)
        return self.deploy_status(config, "model")


class StartsAnewEachTime(Shelf):
    def deploy_apply(self, config: Any, rendered: Any, state: Any, ctx: Any) -> Deployment:
        final, sending = self.folders(config, uuid.uuid4().hex)
        for name, content in rendered.items():
            self.send(content, sending / name)
        os.replace(sending, final)
        return self.deploy_status(config, final.name)


class KeepsAnObject(Shelf):
    def deploy_apply(self, config: Any, rendered: Any, state: Any, ctx: Any) -> Deployment:
        state["folder"] = Path(config.folder)
        return super().deploy_apply(config, rendered, state, ctx)


class OnlyPretends(Shelf):
    there = False

    def deploy_apply(self, config: Any, rendered: Any, state: Any, ctx: Any) -> Deployment:
        self.there = True
        return self.deploy_status(config, "model")

    def deploy_status(self, config: Any, id: str) -> Deployment:
        return Deployment(id, Path(config.folder).resolve().as_uri(), "running" if self.there else "deleted")

    def deploy_delete(self, config: Any, id: str) -> None:
        self.there = False


# --- deleting ---


class DeletesNothing(Shelf):
    def deploy_delete(self, config: Any, id: str) -> None: ...


class DeletesOnce(Shelf):
    def deploy_delete(self, config: Any, id: str) -> None:
        shutil.rmtree(self.folders(config, id)[0])


class LeavesTheFiles(Shelf):
    def deploy_delete(self, config: Any, id: str) -> None:
        self.gone = True

    def deploy_status(self, config: Any, id: str) -> Deployment:
        found = super().deploy_status(config, id)
        return replace(found, state="deleted") if getattr(self, "gone", False) else found


class TakesEveryIdForItsOwn(Shelf):
    def deploy_status(self, config: Any, id: str) -> Deployment:
        return super().deploy_status(config, "model")


class StumblesOverAnId(Shelf):
    def deploy_status(self, config: Any, id: str) -> Deployment:
        return {"model": super().deploy_status(config, "model")}[id]


class FollowsAnIdAnywhere(Shelf):
    def folders(self, config: Any, id: str) -> tuple[Path, Path]:
        return Path(config.folder, id or "none"), Path(config.folder, f".{id}")

    def deploy_status(self, config: Any, id: str) -> Deployment:
        found = super().deploy_status(config, id)
        return found if id == "model" else replace(found, state="deleted")


SOUND = "test_the_check_lets_a_sound_package_pass"
UNFIT = "test_the_check_refuses_what_it_cannot_take"
PURE = "test_rendering_is_pure"
SAFE = "test_rendered_files_are_named_and_referred_to_safely"
SECRET = "test_nothing_rendered_holds_a_secret"
SAME = "test_the_same_package_renders_the_same_wherever_it_lies"
ARRIVES = "test_what_is_sent_arrives_and_runs"
RESUMES = "test_an_interrupted_deployment_resumes"
DELETED = "test_deleted_it_is_gone_and_deleting_again_is_no_error"
UNKNOWN = "test_an_id_that_is_unknown_touches_nothing"

BROKEN = [
    (RefusesEverything, SOUND, "deploy_check refuses a sound package: not today"),
    (ChecksWithTorch, SOUND, "deploy_check imports torch: planning is torch-free"),
    (ChecksOverTheNetwork, SOUND, r"deploy_check reaches out of this process: .*127\.0\.0\.1"),
    (ChecksNothing, UNFIT, "deploy_check has nothing against a package that holds no file"),
    (AnswersWithText, UNFIT, "something else than Problems"),
    (BlamesAnOptionItHasNot, UNFIT, r"blames options that the config does not have: \['bucket'\]"),
    (RendersARandomNumber, PURE, r"gives other files the second time: \['id.txt'\]"),
    (WritesWhileRendering, PURE, "deploy_render changes the disk: .*card.txt"),
    (ChangesThePackage, PURE, "deploy_render changes the package"),
    (RendersOverTheNetwork, PURE, "deploy_render reaches out of this process: "),
    (RendersWithTorch, PURE, "deploy_render imports torch"),
    (RendersNothing, SAFE, "deploy_render gives no file at all"),
    (LeadsOutside, SAFE, r"not relative, or lead outside: \['weights/../../card.txt'\]"),
    (StartsAtTheRoot, SAFE, r"not relative, or lead outside: \['/etc/card.txt'\]"),
    (RefersOutside, SAFE, "card.txt refers out of the package"),
    (RefersToNothing, SAFE, "card.txt refers to a file that is not there"),
    (RendersText, SAFE, "card.txt is a str, not bytes or a FileRef"),
    (ReadsLargeFiles, SAFE, "model.safetensors has 2097152 bytes in memory: give large files by FileRef"),
    (SendsTheEnvironment, SECRET, "environment.txt holds a secret of the environment"),
    (SendsItsToken, SECRET, "settings.txt holds a secret of the environment"),
    (TellsWhereThePackageLay, SAME, r"another folder or on another day: \['source.txt'\]"),
    (TellsTheDay, SAME, r"another folder or on another day: \['day.txt'\]"),
    (AnswersWithAnId, ARRIVES, "deploy_apply gives a str, not a Deployment"),
    (HasNoId, ARRIVES, "a deployment without an id"),
    (TellsOfAnother, ARRIVES, "deploy_status tells of 'model-1' when asked for 'model'"),
    (HasNoAddress, ARRIVES, "a deployment that runs has no url"),
    (Fails, ARRIVES, 'after deploy_apply the status is "failed", not "running"'),
    (LosesAFile, ARRIVES, r"these did not arrive, or not as they were rendered: \['config.json'\]"),
    (RunsBeforeItIsThere, RESUMES, r"interrupted at step \d+ of \d+ .* it says that it is running"),
    (TrustsHalfAFile, RESUMES, "interrupted at step .* not the one of an uninterrupted call"),
    (CountsBeforeItSends, RESUMES, "interrupted at step .* not the one of an uninterrupted call"),
    (StartsAnewEachTime, RESUMES, "makes two deployments"),
    (KeepsAnObject, RESUMES, r"keeps in state\['folder'\] what is no plain JSON data"),
    (OnlyPretends, RESUMES, "takes no step that can be interrupted"),
    (DeletesNothing, DELETED, 'after deploy_delete the status is "running", not "deleted"'),
    (DeletesOnce, DELETED, "deploy_delete of what is gone already raises FileNotFoundError"),
    (LeavesTheFiles, DELETED, "after deploy_delete these are still there: "),
    (TakesEveryIdForItsOwn, UNKNOWN, "the unknown id 'model0' is said to be \"running\""),
    (StumblesOverAnId, UNKNOWN, "deploy_status of the unknown id 'model0' raises KeyError, no HyperionError"),
    (FollowsAnIdAnywhere, UNKNOWN, "deploy_delete of the unknown id .* removed what is not its own"),
]


@pytest.mark.parametrize("broken, test, message", BROKEN, ids=[f"{b.__name__}-{t}" for b, t, _ in BROKEN])
def test_a_broken_deploy_target_is_caught(
    broken: type[DeployTarget], test: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    suite = TestAnHonestTarget()
    hooks = RunHooks()
    hooks.add(broken(), suite.plugin)
    available = {
        "hooks": hooks.deploy_target(suite.plugin),
        "config": ShelfConfig(),
        "packaged": suite.package(tmp_path / "package"),
        "ctx": context(tmp_path),
        "tmp_path": tmp_path,
        "monkeypatch": monkeypatch,
    }
    method = getattr(suite, test)
    wanted = method.__code__.co_varnames[1 : method.__code__.co_argcount]
    with pytest.raises((AssertionError, pytest.fail.Exception), match=f"(?s){message}"):
        method(**{name: available[name] for name in wanted})


def test_every_check_has_a_broken_target() -> None:
    own = {name for name in vars(DeployTargetConformance) if name.startswith("test_")}
    assert own == {test for _, test, _ in BROKEN}


def test_a_part_of_torch_that_is_loaded_already_is_refused_too() -> None:
    nn = pytest.importorskip("torch.nn")
    with pytest.raises(AssertionError, match="deploy_check imports torch"), planning("deploy_check"):
        from torch.nn import functional  # noqa: F401
    assert sys.modules["torch.nn"] is nn, "what was hidden is back"


def test_an_interruption_is_as_a_kill(tmp_path: Path) -> None:
    """What would tidy up afterwards does not happen either, and a file that was being written is left half."""
    one, two = tmp_path / "one", tmp_path / "two"

    def rewrite() -> None:
        try:
            one.write_bytes(b"12345678")
            os.replace(one, two)
        finally:
            os.remove(one)

    with side_effects(stop_at=2) as seen, pytest.raises(Interrupted):
        rewrite()
    seen.cut_the_last_file()
    assert list(tmp_path.iterdir()) == [one]
    assert one.read_bytes() == b"1234"
    (tmp_path / "three").touch()  # nobody watches any more
    assert len(seen.steps) == 1
