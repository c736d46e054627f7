"""A plugin's whole repository, written from a template that already passes its conformance suite.

Templates are ordinary files below `plugin_templates/`, in which words that begin with "changeme" stand for what the
author chooses. Words are replaced, nothing is evaluated.
"""

from __future__ import annotations

import keyword
import os
import re
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import yaml
from hyperion_core.errors import HyperionError
from hyperion_core.kinds import KINDS, kind_named, with_article
from hyperion_core.registry import registry
from hyperion_core.suggest import did_you_mean
from packaging.utils import canonicalize_name

TEMPLATES = Path(__file__).parent / "plugin_templates"
LONGEST = 40
_CORE, _KIT = '"pydantic>=2.10,<3"', '"hyperion-core[testing]>=1,<2"'
_TORCH, _TRANSFORMERS, _SAFETENSORS = '"torch>=2.6,<3"', '"transformers>=5.20,<6"', '"safetensors>=0.6,<1"'


@dataclass(frozen=True, slots=True)
class Template:
    """What is special about one kind. `suffix` ends the class's name; `config` is how a run chooses the plugin."""

    suffix: str
    summary: str
    requires: tuple[str, ...]
    test_requires: tuple[str, ...]
    config: str = ""


TEMPLATE_OF = {
    "adapter": Template(
        "Adapter",
        "A low-rank adapter for Hyperion.",
        (_CORE, _SAFETENSORS, _TORCH),
        (_KIT, _TRANSFORMERS),
        "adapter:\n  type: {name}",
    ),
    "quantizer": Template(
        "Quantizer",
        "A round-to-nearest weight quantizer for Hyperion.",
        (_CORE, _TORCH, _TRANSFORMERS),
        (_KIT,),
        "quantization:\n  method: {name}",
    ),
    "scheduler": Template(
        "Scheduler",
        "A learning-rate schedule for Hyperion.",
        (_CORE, _TORCH),
        (_KIT,),
        "training:\n  lr_scheduler: {name}",
    ),
    "deploy-target": Template("Target", "A deploy target for Hyperion.", (_CORE,), (_KIT,)),
}


@dataclass(frozen=True, slots=True)
class NewPlugin:
    """One plugin to be written."""

    kind: str
    name: str
    folder: Path

    @property
    def identifier(self) -> str:
        return self.name.replace("-", "_")

    @property
    def package(self) -> str:
        return f"hyperion_{self.kind.replace('-', '_')}_{self.identifier}"

    @property
    def module(self) -> Path:
        """The plugin's code, below the folder."""
        return Path("src", self.package, "__init__.py")

    @property
    def test(self) -> Path:
        return Path("tests", f"test_{self.identifier}.py")

    @property
    def config(self) -> str:
        """The YAML that chooses it; "" where no config does."""
        return TEMPLATE_OF[self.kind].config.format(name=self.name)

    def words(self) -> dict[str, str]:
        template = TEMPLATE_OF[self.kind]
        camel = "".join(part.capitalize() for part in self.identifier.split("_"))
        return {
            "changeme-requirements": "\n    ".join(f"{requirement}," for requirement in template.requires),
            "changeme-test-requirements": ", ".join(template.test_requires),
            "changeme-summary": template.summary,
            "changeme-usage": self._fill_nested("usage.md", camel),
            "changeme-distribution": distribution_of(self.kind, self.name),
            "changeme-group": kind_named(self.kind).group,
            "changeme_package": self.package,
            "changeme_class": camel + template.suffix,
            "changeme_file": self.identifier,
            "Changeme": camel,
            "changeme": self.name,
        }

    def files(self) -> dict[Path, str]:
        """Every file's path below the folder, and its text."""
        words, own, shared = self.words(), self._own, TEMPLATES / "shared"
        sources = {
            Path("pyproject.toml"): shared / "pyproject.toml.txt",
            Path("README.md"): shared / "README.md",
            self.module: own / "plugin.py",
            self.test: own / "conformance.py",
            Path(".github", "workflows", "tests.yml"): shared / "tests.yml",
            Path(".gitignore"): shared / "gitignore",
            Path("LICENSE"): shared / "LICENSE",
        }
        filled = {path: _fill(source.read_text(encoding="utf-8"), words) for path, source in sources.items()}
        return filled | {self.module.with_name("py.typed"): ""}

    @property
    def _own(self) -> Path:
        return TEMPLATES / self.kind.replace("-", "_")

    def _fill_nested(self, file: str, camel: str) -> str:
        return _fill((self._own / file).read_text(encoding="utf-8"), {"Changeme": camel, "changeme": self.name})


def new_plugin(kind: str, name: str, folder: Path | None = None) -> NewPlugin:
    """Check what was asked for; writes nothing.

    Raises:
        HyperionError: there is no template for that kind, the name cannot be used, or the folder exists.
    """
    _check_kind(kind)
    _check_name(kind, name)
    folder = Path(distribution_of(kind, name)) if folder is None else folder
    if os.path.lexists(folder):
        raise HyperionError(
            f"{folder} exists already",
            why="nothing is ever overwritten",
            fix="give another folder with --folder, or move that one away",
        )
    if not folder.absolute().parent.is_dir():
        raise HyperionError(
            f"{folder} cannot be made: {folder.absolute().parent} is no folder", fix="make it first, or give another"
        )
    return NewPlugin(kind, name, folder)


def write(plugin: NewPlugin) -> None:
    """Write the repository, whole or not at all: beside its folder, then renamed.

    Raises:
        HyperionError: the disk refuses.
    """
    files, target = plugin.files(), plugin.folder.absolute()
    sibling = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        for path, text in files.items():
            (sibling / path).parent.mkdir(parents=True, exist_ok=True)
            (sibling / path).write_text(text, encoding="utf-8", newline="\n")
        os.rename(sibling, target)
    except OSError as error:
        raise HyperionError(
            f"{plugin.folder} cannot be written",
            why=str(error.strerror or error),
            fix="give another folder with --folder, or make room",
        ) from error
    finally:
        shutil.rmtree(sibling, ignore_errors=True)


def distribution_of(kind: str, name: str) -> str:
    return f"hyperion-{kind}-{canonicalize_name(name)}"


def _check_kind(kind: str) -> None:
    if kind in TEMPLATE_OF:
        return
    kinds, offered = [each.kind for each in KINDS], ", ".join(TEMPLATE_OF)
    if kind in kinds:
        raise HyperionError(
            f"there is no template for {with_article(kind)}",
            why=f"there are templates for: {offered}",
            fix="begin with one of them, and change the base class, the hooks and the entry point's group "
            "(see hyperion_core/specs.py)",
        )
    raise HyperionError(
        f'"{kind}" is no kind of plugin',
        why=f"there are templates for: {offered}",
        fix=did_you_mean(kind, list(TEMPLATE_OF)) or "choose one of them",
    )


def _check_name(kind: str, name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or len(name) > LONGEST:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        near = re.sub(r"[^a-z0-9]+", "-", plain).lstrip("-0123456789")[:LONGEST].strip("-")
        raise HyperionError(
            f'"{name}" is no name for a plugin',
            why=f"a name is lower-case letters and digits, a letter first, single dashes between; at most {LONGEST}",
            fix=f"for example: {near or 'my-' + kind}",
        )
    if keyword.iskeyword(name) or yaml.safe_load(name) != name:
        language = "Python" if keyword.iskeyword(name) else "YAML"
        raise HyperionError(
            f'"{name}" is no name for a plugin',
            why=f"it is a word of {language} that means something else",
            fix=f"for example: my-{name}",
        )
    owners = [
        entry.whose for entry in registry().entries(kind) if canonicalize_name(entry.name) == canonicalize_name(name)
    ]
    if owners:
        raise HyperionError(
            f'{with_article(kind)} called "{name}" is installed already',
            why=f"it belongs to {', '.join(owners)}, and a config could not tell the two apart",
            fix=f"choose another name, for example: my-{name}",
        )


def _fill(text: str, words: dict[str, str]) -> str:
    """In one pass, so that a word in what was put in stays; longer words first."""
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.sub(pattern, lambda found: words[found.group()], text)
