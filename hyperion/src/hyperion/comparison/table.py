"""The results of a grid: rows of text for people, compare.json, compare.md and compare.png."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperion_core.artifact import write_json
from hyperion_core.secrets import redacted

from .grid import Grid, shown

Results = Mapping[str, Mapping[str, Any]]
JSON, MARKDOWN, PLOT = "compare.json", "compare.md", "compare.png"
_COLUMNS = ("base MB", "perplexity before", "after", "tokens/s", "peak MB", "seconds")


def header(grid: Grid) -> list[str]:
    """The varied keys, by their last part where that is enough, and what was measured."""
    short = [key.rpartition(".")[2] for key in grid.keys]
    names = [key if short.count(last) > 1 else last for key, last in zip(grid.keys, short, strict=True)]
    return [*names, *_COLUMNS, "state"]


def cells(grid: Grid, results: Results) -> list[list[str]]:
    """One line a row of the grid, as `header` names its columns."""
    lines = []
    for row in grid.rows:
        result = results[row.name]
        state = result["state"] if not result.get("error") else f"{result['state']}: {result['error']}"
        lines.append(
            [
                *(shown(key, row.values[key]) for key in grid.keys),
                _megabytes(result.get("base_bytes")),
                _figure(result.get("perplexity_before"), ".4g"),
                _figure(result.get("perplexity_after"), ".4g"),
                _figure(result.get("tokens_per_second"), ",.0f"),
                _megabytes(result.get("peak_memory")),
                _figure(result.get("seconds"), ",.0f"),
                state,
            ]
        )
    return lines


def notes(grid: Grid, results: Results) -> list[str]:
    """What a reader of the table has to know."""
    found = [
        "Perplexity is of the supervised tokens of the evaluation data, before the first step and after training. "
        "Base MB (10^6 bytes) is what the base takes in memory, without its adapter; peak MB is of the row's process, "
        "or of the GPU where there is one. Seconds and peak count quantizing too, where it was not in the cache."
    ]
    done = [result for result in results.values() if result["state"] == "done"]
    if _differ(done, "evaluation_data"):
        found.append(
            "Careful: the rows were not evaluated on the same tokens, so that their perplexities do not compare."
        )
    changed = [
        *(["the base model"] if _differ(done, "base") and not _varies(grid, "base_model", "revision") else []),
        *(["the data"] if _differ(done, "data") and not _varies(grid, "dataset") else []),
        *(f"the code of {name}" for name in _other_versions(done)),
    ]
    if changed:
        found.append(
            f"Careful: between one row and another {', '.join(changed)} changed. To compare like with like, run the "
            "grid again into a new folder."
        )
    return found


def _differ(done: Sequence[Mapping[str, Any]], figure: str) -> bool:
    return len({result[figure] for result in done if result.get(figure)}) > 1


def _varies(grid: Grid, *sections: str) -> bool:
    return any(key.partition(".")[0] in sections for key in grid.keys)


def _other_versions(done: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of what several rows ran with; a row's own quantizer is no other row's business."""
    seen: dict[str, set[str]] = {}
    for result in done:
        for name, version in result.get("versions", {}).items():
            seen.setdefault(name, set()).add(version)
    return sorted(name for name, versions in seen.items() if len(versions) > 1)


def write_results(folder: Path, grid: Grid, results: Results) -> None:
    """All three files, each whole or not at all; the picture once there is a row to show.

    Raises:
        OSError: the disk refuses.
    """
    content = {
        "format": 1,
        "config": dict(grid.config),
        "vary": {key: list(values) for key, values in grid.vary.items()},
        "rows": [{"name": row.name, "values": dict(row.values), **results[row.name]} for row in grid.rows],
        "notes": notes(grid, results),
    }
    write_json(folder / JSON, content)
    _write(folder / MARKDOWN, redacted(markdown(grid, results)))
    if any(result["state"] == "done" for result in results.values()):
        from .plot import draw

        draw(grid, results, folder / PLOT)


def markdown(grid: Grid, results: Results) -> str:
    """The table, and what to know of it."""
    lines = [header(grid), ["---"] * len(header(grid)), *cells(grid, results)]
    table = ["| " + " | ".join(cell.replace("|", "\\|") or " " for cell in line) + " |" for line in lines]
    picture = (
        ["", "![Quality against bytes](compare.png)"] if any(r["state"] == "done" for r in results.values()) else []
    )
    return "\n".join([*table, "", *notes(grid, results), *picture, ""])


def _write(path: Path, text: str) -> None:
    sibling = path.with_name(f".{path.name}.partial")
    sibling.write_text(text, encoding="utf-8")
    os.replace(sibling, path)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _megabytes(value: int | None) -> str:
    return "-" if value is None else format(value / 1e6, ",.1f" if value >= 1e7 else ".3g")
