"""What may be wrong around the plugins: Python, a foreign `hyperion`, two copies, versions that do not fit.

Reads metadata and asks where modules lie; imports nothing.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from . import __version__
from .description import requirement_facts
from .distributions import CORE, distributions_on, unreadable_distributions
from .errors import Finding
from .registry import FRAMEWORK

#: The name that another project has on PyPI, and the module that is ours.
FOREIGN = "hyperion"
_MODULES = {FOREIGN: FRAMEWORK, "hyperion_core": CORE}
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "pydantic")


def environment_findings() -> list[Finding]:
    """Everything that is wrong with the environment that this process runs in."""
    installed: dict[str, list[importlib.metadata.Distribution]] = {}
    for distribution in distributions_on():
        name = _name(distribution)
        if name:
            installed.setdefault(name, []).append(distribution)
    family = [each[0] for each in installed.values() if _is_family(each[0])]
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "metadata": _unreadable,
        "Python": lambda: _python(family),
        "foreign distributions": lambda: _foreign(installed),
        **{f"module {module}": partial(_module, module, owner) for module, owner in _MODULES.items()},
        "working directory": _shadows,
        "version": _core_version,
        "copies": lambda: _copies(installed, family),
        "requirements": lambda: _requirements(family),
    }
    return [finding for name, check in checks.items() for finding in _survived(name, check)]


def _survived(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Metadata may be broken in ways that nobody thought of: the other checks go on."""
    try:
        return list(check())
    except Exception as error:
        return [
            Finding("problem", f"the check of the environment's {name} failed", f"{type(error).__name__}: {error}",
                    "something installed here is broken: python -m pip check")
        ]  # fmt: skip


def _name(distribution: importlib.metadata.Distribution) -> str:
    try:
        return canonicalize_name(distribution.metadata["Name"] or "")
    except Exception:  # unreadable metadata: told by _unreadable where it matters
        return ""


def _is_family(distribution: importlib.metadata.Distribution) -> bool:
    """The framework, the core, or anything that is built on the core."""
    try:
        asked = [text.split(";")[0].lower().replace("_", "-") for text in distribution.requires or []]
    except Exception:
        return False
    return _name(distribution) in (CORE, FRAMEWORK) or any(text.startswith(CORE) for text in asked)


def _unreadable() -> Iterator[Finding]:
    for where, why in unreadable_distributions():
        yield Finding("problem", f"the plugins of {where} cannot be listed: its metadata cannot be read", why,
                      "install that distribution again, or delete the folder")  # fmt: skip


def _python(family: list[importlib.metadata.Distribution]) -> Iterator[Finding]:
    version = platform.python_version()
    for distribution in family:
        (asked,) = distribution.metadata.get_all("Requires-Python") or [""]
        try:
            fits = SpecifierSet(asked).contains(version, prereleases=True)
        except InvalidSpecifier:
            continue  # pip takes no notice of it either
        if not fits:
            yield Finding("problem", f"{_whose(distribution)} does not run on this Python",
                          f"it asks for Python {asked}, and this is {version}", "use another Python")  # fmt: skip


def _foreign(installed: dict[str, list[importlib.metadata.Distribution]]) -> Iterator[Finding]:
    for distribution in installed.get(FOREIGN, []):
        yield Finding(
            "problem", f"the distribution {FOREIGN} {distribution.version} is installed, which is another project",
            f"it has the module name {FOREIGN} too, and one of the two hides or overwrites the other",
            f"python -m pip uninstall {FOREIGN}, then install {FRAMEWORK} again",
        )  # fmt: skip


def _module(module: str, owner: str) -> Iterator[Finding]:
    """Whether `import module` gives the module of its distribution."""
    file = _file_of(module)
    try:
        distribution = importlib.metadata.distribution(owner)
    except importlib.metadata.PackageNotFoundError:
        if file is not None and module == FOREIGN:
            yield Finding(
                "problem", f"the module {module} is not ours: {file}", f"{owner} is not installed",
                f"remove or rename it, then install {owner}",
            )  # fmt: skip
        return
    if file is None:
        yield Finding(
            "problem", f"the module {module} of {_whose(distribution)} is missing",
            "its metadata is there, its files are not", f"install {owner} again",
        )  # fmt: skip
    elif not _belongs(file, distribution, module):
        yield Finding(
            "problem", f"`import {module}` gives a file that is not of {_whose(distribution)}: {file}",
            "it stands earlier on Python's path", "rename it, leave its folder, or take that off PYTHONPATH",
        )  # fmt: skip
    elif _overwritten(file, distribution):
        yield Finding(
            "problem", f"{file} is not the file that {_whose(distribution)} installed",
            "it was changed, or another distribution has overwritten it", f"install {owner} again: --force-reinstall",
        )  # fmt: skip


def _file_of(module: str) -> Path | None:
    """The file of a top-level module, imported or not."""
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded:
        return Path(loaded)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def _belongs(file: Path, distribution: importlib.metadata.Distribution, module: str) -> bool:
    own = Path(str(distribution.locate_file(f"{module}/__init__.py")))
    if own.exists():
        return own.resolve() == file.resolve()
    folder = _editable_folder(distribution)
    return folder is not None and folder.resolve() in file.resolve().parents


def _editable_folder(distribution: importlib.metadata.Distribution) -> Path | None:
    try:
        url = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    except (ValueError, AttributeError):
        return None
    return Path(url2pathname(urlsplit(url).path)) if url.startswith("file:") else None


def _overwritten(file: Path, distribution: importlib.metadata.Distribution) -> bool:
    found = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=").decode()
    recorded = [
        path.hash.value
        for path in distribution.files or []
        if path.hash and path.hash.mode == "sha256" and Path(str(path.locate())).resolve() == file.resolve()
    ]
    return bool(recorded) and found not in recorded


def _shadows() -> Iterator[Finding]:
    """Files of the working directory that Python would take for an installed library."""
    here = Path.cwd()
    for module in (*_MODULES, *_LIBRARIES):
        for candidate in (here / f"{module}.py", here / module / "__init__.py"):
            try:
                distribution = importlib.metadata.distribution(_MODULES.get(module, module))
            except importlib.metadata.PackageNotFoundError:
                continue
            if candidate.is_file() and not _belongs(candidate, distribution, module):
                yield Finding(
                    "warning", f"the working directory has a {module} of its own: {candidate}",
                    f"`python -m`, notebooks and scripts here import it in place of {_whose(distribution)}",
                    "rename it, or work in another folder",
                )  # fmt: skip


def _core_version() -> Iterator[Finding]:
    try:
        recorded = importlib.metadata.version(CORE)
    except importlib.metadata.PackageNotFoundError:
        yield Finding("problem", f"{CORE} is not installed, though its module is there",
                      "no plugin can say which contract it needs", f"install {CORE}")  # fmt: skip
        return
    if recorded != __version__:
        yield Finding(
            "problem", f"{CORE} says that it is {recorded}, and the module that is imported is {__version__}",
            "there are two copies, or the metadata is stale", f"install {CORE} again",
        )  # fmt: skip


def _copies(
    installed: dict[str, list[importlib.metadata.Distribution]], family: list[importlib.metadata.Distribution]
) -> Iterator[Finding]:
    names = {fact.name for distribution in family for fact in requirement_facts(distribution)}
    names |= {_name(distribution) for distribution in family}
    for name in sorted(names & installed.keys()):
        copies = {(str(Path(str(each.locate_file(""))).resolve()), each.version): each for each in installed[name]}
        if len(copies) < 2:
            continue
        versions = {version for _, version in copies}
        places = ", ".join(f"{version} in {folder}" for folder, version in copies)
        yield Finding(
            "problem" if len(versions) > 1 else "warning",
            f"{name} is installed {len(copies)} times: {places}",
            "Python imports the first, and pip may report another",
            f"python -m pip uninstall {name} until none is left, then install it once",
        )


def _requirements(family: list[importlib.metadata.Distribution]) -> Iterator[Finding]:
    """Of those without a plugin: where a plugin lacks something, that is told with the plugin."""
    for distribution in family:
        if "[hyperion." in (distribution.read_text("entry_points.txt") or ""):
            continue
        for fact in requirement_facts(distribution):
            if not fact.fits:
                yield Finding(
                    "problem", f"{_whose(distribution)} asks for {fact.requirement}",
                    f"{fact.installed} is installed" if fact.installed else "it is not installed",
                    f'python -m pip install "{fact.requirement}"',
                )  # fmt: skip


def _whose(distribution: importlib.metadata.Distribution) -> str:
    return f"{distribution.metadata['Name']} {distribution.version}"
