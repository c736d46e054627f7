"""Places that a run cannot write to, or read from."""

from __future__ import annotations

from collections.abc import Callable

from .case import Case, Place

Arrange = Callable[[Place], list[str]]


def to(output_dir: str, before: Callable[[Place], object] = lambda place: None, *more: str) -> Arrange:
    """Train into this folder."""

    def arrange(place: Place) -> list[str]:
        before(place)
        return ["train", place.config(), "--output_dir", output_dir, *more]

    return arrange


def with_environment(**values: str) -> Arrange:
    """Train with these variables; "{place}" in them is the case's folder."""

    def arrange(place: Place) -> list[str]:
        place.write("a-file", "")
        place.env.update({name: value.format(place=place.folder) for name, value in values.items()})
        return ["train", place.config(), "--output_dir", "run"]

    return arrange


def _dangling(place: Place) -> None:
    (place.folder / "run").symlink_to(place.folder / "nowhere" / "at" / "all")


def _looping(place: Place) -> None:
    (place.folder / "run").symlink_to(place.folder / "run")


def _cut_checkpoint(place: Place) -> None:
    place.write("run/plan.json", "{}")
    place.write("run/checkpoint-1/adapter/adapter_model.safetensors", b"\0" * 10)


def _finished(place: Place) -> None:
    place.write("run/hyperion.json", "{}")


def case(what: str, arrange: Arrange, *says: str) -> Case:
    return Case("disk", what, arrange, says)


CASES: tuple[Case, ...] = (
    case("the output folder is a file", to("rows.jsonl", lambda place: place.rows()), "is a file"),
    case("the output folder is below a file", to("rows.jsonl/run", lambda place: place.rows()), "cannot be written",
         "rows.jsonl is a file"),
    case("the output folder is a link to nowhere", to("run", _dangling), "is a link to nowhere", "nowhere/at/all"),
    case("the output folder is a link to itself", to("run", _looping), "is a link to nowhere"),
    case("the output folder is not empty", to("run", lambda place: place.write("run/notes.txt", "")), "is not empty",
         "--resume"),
    case("nothing to resume", to("run", lambda place: None, "--resume"), "no complete checkpoint"),
    case("only a half-written checkpoint to resume", to("run", _cut_checkpoint, "--resume"), "no complete checkpoint"),
    case("a finished run to resume", to("run", _finished, "--resume"), "is finished"),
    case("HYPERION_CACHE is a file", with_environment(HYPERION_CACHE="{place}/a-file"), "HYPERION_CACHE", "a-file"),
    case("HYPERION_CACHE is below a file", with_environment(HYPERION_CACHE="{place}/a-file/cache"), "HYPERION_CACHE"),
    case("HF_DATASETS_CACHE is below a file", with_environment(HF_DATASETS_CACHE="{place}/a-file/cache"),
         "HF_DATASETS_CACHE"),
    case("a home folder that is a file", with_environment(HYPERION_CACHE="", XDG_CACHE_HOME="", HF_HOME="",
         HOME="{place}/a-file"), "HYPERION_CACHE"),
)  # fmt: skip
