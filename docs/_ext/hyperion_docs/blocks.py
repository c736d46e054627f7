"""The code of a page, run as a reader would, and what it prints held against what the page says.

In the order of the page, in one empty folder:

- a `console` block: each line that begins with `$ ` is run by the shell; what follows is what it prints;
- a `code-block` with a caption, in backticks: the file of that name is written;
- a `diff` with a caption: lines of that file are replaced, those with `-` by those with `+`;
- a comment `<!-- setup: COMMAND -->`: a command that is run and not shown.

Blocks of any other kind are not run. In what a command prints, `…` stands for any text, and a line that is `…` alone
for any lines. `python -m hyperion_docs.blocks PAGE…` writes what the commands print now into the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"<!-- setup: (?P<setup>.+?) -->"
    r"|^(?P<fence>`{3,})(?P<kind>console|\{code-block\} \w+)\n(?P<body>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)
_CAPTION = re.compile(r":caption: `(\S+)`\n\n?")
_SECONDS = 1800


@dataclass(frozen=True)
class Block:
    """One piece of a page that is run. `start` and `end`: where its text stands in the page."""

    kind: str  # "setup", "console", "file" or "diff"
    name: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Outcome:
    """One command: its exit code, what the page says that it prints, and what it printed."""

    command: str
    code: int
    expected: str
    printed: str

    @property
    def as_expected(self) -> bool:
        return matches(self.expected, self.printed)


def blocks(page: str) -> Iterator[Block]:
    """What is run of a page, in order."""
    for found in _BLOCK.finditer(page):
        if found["setup"]:
            yield Block("setup", "", found["setup"], found.start("setup"), found.end("setup"))
        elif found["kind"] == "console":
            yield Block("console", "", found["body"], found.start("body"), found.end("body"))
        elif caption := _CAPTION.match(found["body"]):
            kind = "diff" if found["kind"].endswith(" diff") else "file"
            yield Block(kind, caption[1], found["body"][caption.end() :], found.start("body"), found.end("body"))


def run_page(page: str, folder: Path, env: Mapping[str, str]) -> tuple[list[Outcome], str]:
    """Run a page in `folder`: what its commands did, and the page with what they printed in it.

    Raises:
        subprocess.CalledProcessError: a command that is not shown failed.
        ValueError: a diff does not fit its file.
    """
    outcomes: list[Outcome] = []
    parts, written = [], 0
    for block in blocks(page):
        if block.kind == "setup":
            subprocess.run(block.text, shell=True, cwd=folder, env=env, check=True, capture_output=True)
        elif block.kind == "file":
            path = folder / block.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.kind == "diff":
            path = folder / block.name
            path.write_text(patched(path.read_text(encoding="utf-8"), block.text), encoding="utf-8")
        else:
            done = [_run(command, expected, folder, env) for command, expected in commands(block.text)]
            outcomes += done
            parts += [page[written : block.start], *(_shown(outcome) for outcome in done)]
            written = block.end
    return outcomes, "".join([*parts, page[written:]])


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, what it prints) of a console block; a backslash continues a command on the next line."""
    for piece in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, printed = re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", piece, re.DOTALL).groups()  # type: ignore[union-attr]
        yield command, printed


def matches(expected: str, printed: str) -> bool:
    """Whether a text is what a page says, where `…` stands for anything."""
    pattern = []
    for line in expected.strip().splitlines():
        if line.strip() == "…":
            pattern.append(r"(?:.*\n)*?")
        else:
            pattern.append(r"[^\n]*?".join(re.escape(part) for part in line.rstrip().split("…")) + r"\n")
    text = "".join(f"{line.rstrip()}\n" for line in printed.strip().splitlines())
    return re.fullmatch("".join(pattern), text) is not None


def patched(text: str, diff: str) -> str:
    """A text with the lines of a diff replaced.

    Raises:
        ValueError: its lines do not stand there, or more than once.
    """
    lines = diff.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    if text.count(old) != 1:
        raise ValueError(f"these lines stand {text.count(old)} times in the file:\n{old}")
    return text.replace(old, new)


def environment(folder: Path) -> dict[str, str]:
    """A reader's shell: no colours, no network, a cache of its own, and a Python of its own to install into, which
    sees what is installed for this one."""
    venv.create(folder / "venv", with_pip=False, symlinks=os.name != "nt")
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    scheme, home = "nt" if os.name == "nt" else "posix_prefix", str(folder / "venv")
    site_packages = Path(sysconfig.get_path("purelib", scheme, vars={"base": home, "platbase": home}))
    beneath = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    lines = [f"import site; site.addsitedir({path!r})" for path in sorted(beneath)]
    (site_packages / "beneath.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (scripts / "hyperion").write_text('#!/bin/sh\nexec python -m hyperion "$@"\n', encoding="utf-8")
    (scripts / "hyperion").chmod(0o755)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(scripts), str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "HYPERION_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",  # all is here
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it so: no isolation
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "COLUMNS": "110",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PY_COLORS": "0",
    }


def _run(command: str, expected: str, folder: Path, env: Mapping[str, str]) -> Outcome:
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, timeout=_SECONDS, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    text = done.stdout.decode("utf-8", errors="replace").replace("\r\n", "\n")
    # A bar that writes over itself leaves, as on a terminal, what it wrote last.
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return Outcome(command, done.returncode, expected, "\n".join(shown))


def _shown(outcome: Outcome) -> str:
    lines = (outcome.expected if outcome.as_expected else outcome.printed).strip("\n").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in [f"$ {outcome.command}", *lines])


def main(pages: list[str]) -> None:
    for name in pages:
        path = Path(name)
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as caches:
            outcomes, page = run_page(path.read_text(encoding="utf-8"), Path(folder), environment(Path(caches)))
        path.write_text(page, encoding="utf-8")
        print(f"{name}: {sum(not each.as_expected for each in outcomes)} of {len(outcomes)} outputs were written anew")


if __name__ == "__main__":
    main(sys.argv[1:])
