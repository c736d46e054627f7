"""The conformance suite of deploy targets: a small package goes there and back, interrupted at every step."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from ..config import PluginConfig
from ..context import RunContext
from ..errors import HyperionError, Problem
from ..facts import Deployment, FileRef, PackageFacts
from ..hooks import RunHooks
from ..kinds import DeployTarget
from ..specs import DeploySpecs
from .adapters import context
from .planning import planning
from .plugins import PluginConformance
from .rendered_files import differing, is_inside, rendered_hash, tree, whole
from .side_effects import Interrupted, SideEffects, side_effects

LARGE = 2**20
MOST_INTERRUPTIONS = 60
CANARY = "canary-5b1f0c92d4e7-must-not-be-sent"
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


class DeployTargetConformance(PluginConformance):
    """What a deploy target must do. A test is two lines:

        class TestMyRegistry(DeployTargetConformance):
            plugin = "my-registry"

    Each test works in an empty folder of its own, so a relative path in `options` leads there. A target that sends
    to a service is given a stand-in of it by a fixture of the test; it replaces `contents`.

    options: options of the config beyond its defaults.
    package_format: the format of the package that is sent.
    patience: seconds that a deployment may be "pending".
    """

    kind = "deploy-target"
    package_format: ClassVar[str] = "safetensors"
    patience: ClassVar[float] = 10.0

    # --- what an author may replace ---

    def package(self, folder: Path) -> PackageFacts:
        """A package that the target takes: the same files every time, one of them large, one in a subfolder."""
        files = {
            "config.json": b'{"model_type": "llama"}\n',
            "tokenizer/vocabulary.txt": b"one\ntwo\nthree\n",
            "model.safetensors": b"weights " * (LARGE // 4),
        }
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return PackageFacts(folder, self.package_format, {name: len(content) for name, content in files.items()})

    def unfit_packages(self, package: PackageFacts) -> dict[str, PackageFacts]:
        """Packages that no target can take, by what is wrong with them; add those that yours cannot."""
        return {
            "that holds no file": PackageFacts(package.folder, package.format, {}),
            "one of whose files is gone": PackageFacts(
                package.folder, package.format, {**package.files, "gone.safetensors": 8}
            ),
        }

    def contents(self, config: PluginConfig, deployment: Deployment) -> Mapping[str, bytes]:
        """What is there now under the deployment's url, by path; {} for nothing. Knows "file:" urls only."""
        parts = urlsplit(deployment.url)
        if parts.scheme != "file":
            pytest.fail(f"the url {deployment.url!r} is no file: url: replace `contents` to look at what was sent")
        folder = Path(url2pathname(parts.path))
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    # --- fixtures ---

    @pytest.fixture(autouse=True)
    def _in_an_empty_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")

    @pytest.fixture
    def hooks(self, plugin_class: type[DeployTarget]) -> DeploySpecs:
        """The target's hooks, called through pluggy as a run calls them."""
        hooks = RunHooks()
        hooks.add(plugin_class(), self.plugin)
        return hooks.deploy_target(self.plugin)

    @pytest.fixture
    def packaged(self, tmp_path: Path) -> PackageFacts:
        return self.package(tmp_path / "package")

    # --- before anything is sent ---

    def test_the_check_lets_a_sound_package_pass(
        self, hooks: DeploySpecs, config: PluginConfig, packaged: PackageFacts
    ) -> None:
        """With the suite's options nothing stands against an ordinary package; asking needs no network, no torch."""
        with planning("deploy_check"):
            problems = hooks.deploy_check(config=config, package=packaged) or []
        assert not problems, f"deploy_check refuses a sound package: {'; '.join(map(str, problems))}"

    def test_the_check_refuses_what_it_cannot_take(
        self, hooks: DeploySpecs, config: PluginConfig, packaged: PackageFacts
    ) -> None:
        """Found before sending, told as problems, each at an option of the config or at the whole."""
        for fault, package in self.unfit_packages(packaged).items():
            with planning("deploy_check"):
                problems = hooks.deploy_check(config=config, package=package)
            assert problems, f"deploy_check has nothing against a package {fault}"
            strange = [problem for problem in problems if not isinstance(problem, Problem)]
            assert not strange, f"deploy_check answers with something else than Problems: {strange}"
            paths = {problem.path.partition(".")[0] for problem in problems} - {"", *type(config).allowed_keys()}
            assert not paths, f"deploy_check blames options that the config does not have: {sorted(paths)}"

    def test_rendering_is_pure(self, hooks: DeploySpecs, config: PluginConfig, packaged: PackageFacts) -> None:
        """The same twice, and nothing is written, sent or asked for."""
        before = tree(packaged.folder)
        with planning("deploy_render") as seen:
            one = hooks.deploy_render(config=config, package=packaged)
            two = hooks.deploy_render(config=config, package=packaged)
        assert tree(packaged.folder) == before, "deploy_render changes the package"
        assert not seen.writes, f"deploy_render changes the disk: {seen.writes}"
        assert one == two, f"deploy_render gives other files the second time: {differing(one, two)}"

    def test_rendered_files_are_named_and_referred_to_safely(
        self, hooks: DeploySpecs, config: PluginConfig, packaged: PackageFacts
    ) -> None:
        """Paths stay inside the deployment, references inside the package, and large files are references."""
        rendered = hooks.deploy_render(config=config, package=packaged)
        assert rendered, "deploy_render gives no file at all"
        unsafe = [path for path in rendered if not is_inside(path)]
        assert not unsafe, f"deploy_render gives paths that are not relative, or lead outside: {unsafe}"
        package = packaged.folder.resolve()
        for path, content in rendered.items():
            if isinstance(content, FileRef):
                target = packaged.folder / content.path
                assert target.is_file(), f"{path} refers to a file that is not there: {content.path}"
                assert target.resolve().is_relative_to(package), f"{path} refers out of the package: {content.path}"
            else:
                assert isinstance(content, bytes), f"{path} is a {type(content).__name__}, not bytes or a FileRef"
                assert len(content) < LARGE, f"{path} has {len(content)} bytes in memory: give large files by FileRef"

    def test_nothing_rendered_holds_a_secret(
        self, hooks: DeploySpecs, config: PluginConfig, packaged: PackageFacts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever secret the environment holds, none is in what is written down and sent."""
        monkeypatch.setenv("HYPERION_CANARY_TOKEN", CANARY)
        monkeypatch.setattr(os, "environ", _Canaries(os.environ))
        rendered = hooks.deploy_render(config=config, package=packaged)
        forms = (CANARY.encode(), base64.b64encode(CANARY.encode()))
        for path, content in rendered.items():
            told = path.encode() + (content if isinstance(content, bytes) else b"")
            assert not any(form in told for form in forms), f"{path} holds a secret of the environment"

    def test_the_same_package_renders_the_same_wherever_it_lies(
        self,
        hooks: DeploySpecs,
        config: PluginConfig,
        packaged: PackageFacts,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Same files in another folder, listed in another order, on another day: the same bytes."""
        one = hooks.deploy_render(config=config, package=packaged)
        folder = tmp_path / "elsewhere" / "copy"
        shutil.copytree(packaged.folder, folder)
        copy = PackageFacts(folder, packaged.format, dict(reversed(list(packaged.files.items()))))
        tomorrow = time.time() + 86400
        monkeypatch.setattr(time, "time", lambda: tomorrow)
        two = hooks.deploy_render(config=config, package=copy)
        assert rendered_hash(one, packaged.folder) == rendered_hash(two, folder), (
            "the same package renders to other bytes in another folder or on another day: "
            f"{differing(whole(one, packaged.folder), whole(two, folder))}"
        )

    # --- sending ---

    def test_what_is_sent_arrives_and_runs(
        self, hooks: DeploySpecs, config: PluginConfig, packaged: PackageFacts, ctx: RunContext
    ) -> None:
        """Every rendered file is there, byte for byte; the answer and the status agree."""
        rendered = hooks.deploy_render(config=config, package=packaged)
        answer = hooks.deploy_apply(config=config, rendered=rendered, state={}, ctx=ctx)
        assert isinstance(answer, Deployment), f"deploy_apply gives a {type(answer).__name__}, not a Deployment"
        assert isinstance(answer.id, str) and answer.id, "deploy_apply gives a deployment without an id"
        running = self.wait(hooks, config, answer)
        assert running.id == answer.id, f"deploy_status tells of {running.id!r} when asked for {answer.id!r}"
        assert running.url, "a deployment that runs has no url"
        there, sent = self.contents(config, running), whole(rendered, packaged.folder)
        lacking = [path for path in sent if there.get(path) != sent[path]]
        assert not lacking, f"these did not arrive, or not as they were rendered: {lacking}"

    def test_an_interrupted_deployment_resumes(
        self, hooks: DeploySpecs, config: PluginConfig, packaged: PackageFacts, ctx: RunContext
    ) -> None:
        """Killed at any step, in the middle of a file too, and called again with the state that it left: the same
        deployment as without an interruption, and never one that says "running" before all of it is there."""
        rendered = hooks.deploy_render(config=config, package=packaged)
        with side_effects() as seen:
            first = self.apply(hooks, config, rendered, {}, ctx, seen)
        expected = dict(self.contents(config, self.wait(hooks, config, first)))
        hooks.deploy_delete(config=config, id=first.id)
        assert seen.steps, (
            "deploy_apply takes no step that can be interrupted: it writes no file, opens no connection, keeps "
            "nothing in `state` and reports no progress"
        )
        count = len(seen.steps)
        for step in sorted({1 + index * count // MOST_INTERRUPTIONS for index in range(MOST_INTERRUPTIONS)}
                           if count > MOST_INTERRUPTIONS else range(1, count + 1)):  # fmt: skip
            state: dict[str, Any] = {}
            moment = f"interrupted at step {step} of {count} ({seen.steps[step - 1]})"
            with side_effects(stop_at=step) as cut, suppress(Interrupted):
                self.apply(hooks, config, rendered, state, ctx, cut)
            cut.cut_the_last_file()
            early = self.status(hooks, config, first.id)
            if early is not None and early.state == "running":
                there = self.contents(config, early)
                assert there == expected, f"{moment} it says that it is running: {differing(there, expected)} is not"
            answer = self.apply(hooks, config, rendered, state, ctx)
            again = self.apply(hooks, config, rendered, state, ctx)
            there = self.contents(config, self.wait(hooks, config, answer))
            assert there == expected, (
                f"{moment} and called again, the deployment is not the one of an uninterrupted call: "
                f"{differing(there, expected)}"
            )
            assert again.id == answer.id, f"{moment}, calling twice more makes two deployments: {answer.id}, {again.id}"
            hooks.deploy_delete(config=config, id=answer.id)

    def test_deleted_it_is_gone_and_deleting_again_is_no_error(
        self, hooks: DeploySpecs, config: PluginConfig, packaged: PackageFacts, ctx: RunContext
    ) -> None:
        """Status "deleted", nothing left under its url; a second time, nothing happens."""
        rendered = hooks.deploy_render(config=config, package=packaged)
        answer = hooks.deploy_apply(config=config, rendered=rendered, state={}, ctx=ctx)
        running = self.wait(hooks, config, answer)
        for moment in ("what runs", "what is gone already"):
            try:
                hooks.deploy_delete(config=config, id=answer.id)
            except Exception as error:
                raise AssertionError(f"deploy_delete of {moment} raises {type(error).__name__}: {error}") from error
            after = hooks.deploy_status(config=config, id=answer.id)
            assert after.state == "deleted", f'after deploy_delete the status is "{after.state}", not "deleted"'
            left = sorted(self.contents(config, running))
            assert not left, f"after deploy_delete these are still there: {left}"

    def test_an_id_that_is_unknown_touches_nothing(
        self, hooks: DeploySpecs, config: PluginConfig, packaged: PackageFacts, ctx: RunContext, tmp_path: Path
    ) -> None:
        """An id comes from a command line: a wrong one is "deleted" or a HyperionError, and harms nothing else."""
        rendered = hooks.deploy_render(config=config, package=packaged)
        answer = hooks.deploy_apply(config=config, rendered=rendered, state={}, ctx=ctx)
        before = self.contents(config, self.wait(hooks, config, answer)), tree(tmp_path)
        parent = "/".join([".."] * 3)
        for wrong in (f"{answer.id}0", "nobody-knows-this", "", ".", "..", f"{parent}/package", str(packaged.folder)):
            found = self.status(hooks, config, wrong)
            assert found is None or found.state == "deleted", f'the unknown id {wrong!r} is said to be "{found.state}"'
            with suppress(HyperionError):
                hooks.deploy_delete(config=config, id=wrong)
            after = self.contents(config, answer), tree(tmp_path)
            assert after == before, f"deploy_delete of the unknown id {wrong!r} removed what is not its own"

    # --- what the tests above are made of ---

    @pytest.fixture
    def ctx(self, tmp_path: Path) -> RunContext:
        return context(tmp_path)

    def apply(
        self,
        hooks: DeploySpecs,
        config: PluginConfig,
        rendered: Mapping[str, bytes | FileRef],
        state: dict[str, Any],
        ctx: RunContext,
        seen: SideEffects | None = None,
    ) -> Deployment:
        """`deploy_apply` with a state that is kept in `state` at once, as JSON; what it does counts as a step."""
        step = seen.step if seen else lambda what: None
        told = RunContext(ctx.plan, ctx.seed, ctx.device, ctx.output, ctx.cache, progress=_Steps(step))
        return hooks.deploy_apply(config=config, rendered=rendered, state=_Kept(state, step), ctx=told)

    def wait(self, hooks: DeploySpecs, config: PluginConfig, deployment: Deployment) -> Deployment:
        """The status when it is running.

        Raises:
            AssertionError: it is not, within `patience` seconds.
        """
        end = time.monotonic() + self.patience
        found = hooks.deploy_status(config=config, id=deployment.id)
        while found.state == "pending" and time.monotonic() < end:
            time.sleep(0.05)
            found = hooks.deploy_status(config=config, id=deployment.id)
        assert found.state == "running", f'after deploy_apply the status is "{found.state}", not "running"'
        return found

    def status(self, hooks: DeploySpecs, config: PluginConfig, id: str) -> Deployment | None:
        """The status, None where the target refuses the id."""
        try:
            return hooks.deploy_status(config=config, id=id)
        except HyperionError:
            return None
        except Exception as error:
            message = f"deploy_status of the unknown id {id!r} raises {type(error).__name__}, no HyperionError: {error}"
            raise AssertionError(message) from error


class _Kept(UserDict[str, Any]):
    """A `state` as the framework keeps one: each assignment is written down at once, as JSON."""

    def __init__(self, kept: dict[str, Any], step: Callable[[str], None]) -> None:
        super().__init__(json.loads(json.dumps(kept)))
        self.kept, self.step = kept, step

    def __setitem__(self, key: str, value: Any) -> None:
        if hasattr(self, "step"):
            self.step(f"state[{key!r}]")
            try:
                self.kept[key] = json.loads(json.dumps(value))
            except TypeError as error:
                pytest.fail(f"deploy_apply keeps in state[{key!r}] what is no plain JSON data: {error}")
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.step(f"del state[{key!r}]")
        self.kept.pop(key, None)
        super().__delitem__(key)


class _Steps:
    """A `Progress` whose every report is a step."""

    def __init__(self, step: Callable[[str], None]) -> None:
        self.step = step

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield lambda done: self.step(f"progress of {description}")


class _Canaries(UserDict[str, str]):
    """An environment in which every secret is set, under any name that sounds like one."""

    def __missing__(self, key: str) -> str:
        if _SECRET.search(key):
            return CANARY
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or bool(_SECRET.search(str(key)))
