"""`DatasetProcessor`: any dataset to rows of segments or messages, split for training and evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperion_core.errors import DataError, Problem

from .arguments import DataArgumentsError, argument_problems, effect_problems
from .cached import drop_damaged_rows
from .formats import BadRow, Layout, detect_layout, row_converter
from .resolution import find_source
from .sources import OpenSource, Source
from .splitting import choose_held_out
from .templates import InstructionTemplates

if TYPE_CHECKING:
    from datasets import Dataset
    from hyperion_core.context import Progress

# Part of the cache key: raise it when prepared rows of the same input change.
_PREPARED_VERSION = 1
_BAD_ROWS_SHOWN = 5


class DatasetProcessor:
    """Reads a dataset and prepares its rows for training.

    Constructing one checks every argument and finds the source, and imports neither torch nor datasets.

    Args:
        dataset: a hub id; a local .json, .jsonl, .csv, .parquet, .txt or .text file, or a folder of such files;
            `package://<package>/<path>`; a `datasets.Dataset`; or a list of mappings.
        instruction_template, input_template, output_template: texts around `{instruction}`, `{input}` and
            `{output}` for instruction rows; the blocks are joined by a newline, and the input block is left out
            when a row has no input. What stands before `{output}` is part of the prompt. The defaults are
            "Task:\\n{instruction}\\n", "Input:\\n{input}\\n" and "Answer:\\n{output}".
        sample_limit: keep at most so many rows, drawn by `seed` from the whole source and left in their order.
        validation_split: rows held out for evaluation, of those that `sample_limit` leaves: a fraction in [0, 1),
            or a whole number of rows. All copies of a row (white space and case aside) stay on one side; where that
            does not come out even, a few rows fewer are held out.
        format: "auto" (from the columns), "chat", "instruction", "completion" or "text". "chat" also turns
            instruction and completion rows into messages.
        split, name, revision: split, configuration and revision of a hub dataset.
        columns: our field name to the data's column name, for example {"instruction": "question"}.
        system: the system message of chat rows that have none.
        seed: decides which rows are sampled and held out; the same on every machine.
        base_dir: what relative paths are relative to; the working directory unless given.

    Raises:
        DataArgumentsError: a `DataError` that holds all problems of the arguments.
    """

    def __init__(
        self,
        dataset: str | Path | Dataset | Sequence[Mapping[str, Any]],
        *,
        instruction_template: str | None = None,
        input_template: str | None = None,
        output_template: str | None = None,
        sample_limit: int | None = None,
        validation_split: float | int = 0.0,
        format: str = "auto",
        split: str = "train",
        name: str | None = None,
        revision: str | None = None,
        columns: Mapping[str, str] | None = None,
        system: str | None = None,
        seed: int = 42,
        base_dir: str | Path | None = None,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "instruction_template": instruction_template,
            "input_template": input_template,
            "output_template": output_template,
            "sample_limit": sample_limit,
            "validation_split": validation_split,
            "format": format,
            "split": split,
            "name": name,
            "revision": revision,
            "columns": columns,
            "system": system,
            "seed": seed,
        }
        source: Source | None = None
        problems = []
        try:
            source = find_source(dataset, base_dir=base_dir, split=split, name=name, revision=revision)
        except DataError as error:
            problems.append(Problem("", error.what, error.why, error.fix))
        problems += argument_problems(self._arguments, source.kind if source else None)
        if problems or source is None:
            raise DataArgumentsError(problems)
        self._source = source
        self._columns = dict(columns or {})
        self._templates = InstructionTemplates.of(instruction_template, input_template, output_template)
        self._prepared: dict[str, Any] = {}

    def row_count(self) -> int | None:
        """Rows of the source, counted without torch or datasets; None when that would need a download or a long
        parse."""
        return self._source.cheap_count()

    def split_sizes(self) -> tuple[int, int] | None:
        """(training rows, evaluation rows) that `prepare` will give, or nearly so where copies of rows must stay
        together; None when `row_count` is."""
        count = self.row_count()
        return None if count is None else self._sizes(count)

    def detected_format(self) -> str | None:
        """The row format in force, as far as it is known without importing datasets; else None.

        Raises:
            DataError: the columns fit no format or several, or an argument does nothing for this format.
        """
        found = self._source.columns()
        return None if found is None else self._layout(found).format

    def check_first_rows(self) -> None:
        """Prepares the first rows of local text files and lists, without importing datasets, so that a fault that
        most rows share is found before a run.

        Raises:
            DataError: as `prepare`, for those rows.
        """
        found = self._source.columns()
        if found is None:
            return
        convert = row_converter(self._layout(found), self._templates, self._arguments["system"])
        count = self.row_count() if self._arguments["sample_limit"] is not None else None
        wanted = self._sample(count)
        rows = (row for number, row in enumerate(self._source.first_rows()) if wanted is None or wanted[number])
        for _ in _good_rows(rows, convert, self._source.label, lambda done: None):
            pass

    def prepare(self, progress: Progress | None = None) -> tuple[Dataset, Dataset | None]:
        """Training and evaluation rows; the second is None when `validation_split` is 0.

        Both have one column: `messages`, a list of {role: str, content: str}, for chat rows, and otherwise
        `segments`, a list of {text: str, supervised: bool}. Rows of files, hub and datasets are written to
        memory-mapped Arrow in datasets' cache, once for the same data and arguments.

        Raises:
            DataError: the data cannot be had or read, some rows cannot be trained on (the first few are named), or
                rows are to be held out and all are the same.
        """
        source = self._source.open()
        layout = self._layout(source.columns)
        total = source.count() if self._arguments["sample_limit"] is not None else None
        wanted = self._sample(total)
        rows = self._converted(source, layout, wanted, progress)
        _, eval_rows = self._sizes(len(rows))
        train, evaluation = rows, None
        if eval_rows:
            import numpy as np

            order = _permutation(self._arguments["seed"], len(rows))
            aside = choose_held_out(rows, order, eval_rows, self._source.label)
            train, evaluation = rows.select(np.flatnonzero(~aside)), rows.select(np.flatnonzero(aside))
        self._prepared = {
            "format": layout.format,
            "columns": dict(layout.columns),
            "rows": len(rows) if total is None else total,
            "train_rows": len(train),
            "eval_rows": 0 if evaluation is None else len(evaluation),
            "fingerprint": rows._fingerprint,
        }
        return train, evaluation

    def provenance(self) -> dict[str, Any]:
        """Where the data came from, for the artifact: source, kind, SHA-256 and size of local files, hub revision,
        arguments, and, once prepared, format, rows and fingerprint. Ready for JSON."""
        given = {key: value for key, value in self._arguments.items() if key not in ("split", "name", "revision")}
        given["columns"] = self._columns or None
        known = self._prepared or {"rows": self.row_count()}
        return {
            "source": self._source.label,
            "kind": self._source.kind,
            **self._source.describe(),
            "arguments": {key: value for key, value in given.items() if value is not None},
            **known,
        }

    def literals(self) -> tuple[str, ...]:
        """The templates' own texts that every prepared row holds; none unless they are instruction rows."""
        if self._prepared.get("format") != "instruction":
            return ()
        used = (self._templates.instruction, self._templates.output)
        return tuple(text for each in used for text in (each.before, each.after) if text.strip())

    def _layout(self, found: Sequence[str]) -> Layout:
        layout = detect_layout(found, self._source.label, format=self._arguments["format"], columns=self._columns)
        problems = effect_problems(self._arguments, layout.format)
        if problems:
            raise DataArgumentsError(problems)
        return layout

    def _sizes(self, count: int) -> tuple[int, int]:
        limit, held_out = self._arguments["sample_limit"], self._arguments["validation_split"]
        count = count if limit is None else min(count, limit)
        if not held_out or not count:
            return count, 0
        eval_rows = held_out if isinstance(held_out, int) else max(1, round(count * held_out))
        if eval_rows >= count:
            raise DataError(
                f"{self._source.label} has too few rows to hold out {eval_rows} of them",
                why=f"there are {count} rows, and validation_split is {held_out}",
                fix="lower `validation_split`, or give more rows",
            )
        return count - eval_rows, eval_rows

    def _sample(self, total: int | None) -> Any:
        """Truth values (N,) of the rows kept, or None for all of them."""
        limit = self._arguments["sample_limit"]
        if total is None or limit >= total:
            return None
        import numpy as np

        wanted = np.zeros(total, dtype=bool)
        wanted[_permutation(self._arguments["seed"], total)[:limit]] = True
        return wanted

    def _converted(self, source: OpenSource, layout: Layout, wanted: Any, progress: Progress | None) -> Dataset:
        import datasets

        features = {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "segments": [{"text": datasets.Value("string"), "supervised": datasets.Value("bool")}],
        }
        column = layout.output_column
        schema = datasets.Features({column: features[column]})
        convert = row_converter(layout, self._templates, self._arguments["system"])
        with _shown(progress, f"reading {self._source.label}", wanted, self._source) as advance:
            located = source.rows(tuple(layout.columns.values()), wanted)
            rows = _good_rows(located, convert, self._source.label, advance)
            if self._source.kind == "rows":  # they are in memory anyway
                return datasets.Dataset.from_list(list(rows), features=schema)
            fingerprint = self._fingerprint(source, layout)
            try:
                drop_damaged_rows(fingerprint)
                return datasets.Dataset.from_generator(lambda: rows, features=schema, fingerprint=fingerprint)
            except (datasets.exceptions.DatasetGenerationError, OSError) as error:
                raise _cause(error, self._source.label) from error

    def _fingerprint(self, source: OpenSource, layout: Layout) -> str:
        """Names the prepared rows in datasets' cache: the same for the same rows and arguments, anywhere."""
        arguments = self._arguments
        settings = [_PREPARED_VERSION, source.identity(), layout.format, layout.shape, dict(layout.columns)]
        settings += [arguments[key] for key in ("system", "sample_limit")]
        settings += [arguments["seed"] if arguments["sample_limit"] is not None else None]
        settings += [repr(self._templates)]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _permutation(seed: int, count: int) -> Any:
    """A permutation of range(count), (count,). RandomState's stream is frozen by NumPy's policy, so that a split
    is the same with every version."""
    import numpy as np

    return np.random.RandomState(seed).permutation(count)


def _good_rows(
    located: Iterator[tuple[str, Mapping[str, Any]]],
    convert: Callable[[Mapping[str, Any]], dict[str, Any]],
    label: str,
    advance: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    """Converted rows. A bad one is an error, raised once a few more have been found to be named with it."""
    bad: list[tuple[str, BadRow]] = []
    empty = True
    for place, row in located:
        empty = False
        try:
            good = convert(row)
        except BadRow as error:
            bad.append((place, error))
            if len(bad) == _BAD_ROWS_SHOWN:
                break
            continue
        advance(1)
        yield good
    if bad:
        rows = "a row" if len(bad) == 1 else f"{len(bad)} rows" if len(bad) < _BAD_ROWS_SHOWN else "rows"
        raise DataError(
            f"{label} has {rows} that cannot be trained on",
            why="\n".join(f"{place}: {error.what}" for place, error in bad),
            fix="; ".join(dict.fromkeys(error.fix for _, error in bad)),
        ) from bad[0][1]
    if empty:
        raise DataError(f"{label} has no rows", why="there is nothing in it", fix="give data that holds rows")


@contextmanager
def _shown(progress: Progress | None, what: str, wanted: Any, source: Source) -> Iterator[Callable[[int], None]]:
    """Progress through the caller's display, and datasets' own bars silent; or the other way round."""
    if progress is None:
        yield lambda done: None
        return
    import datasets

    total = source.cheap_count() if wanted is None else int(wanted.sum())
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with progress.task(what, total) as advance:
            yield advance
    finally:
        if not were_off:
            datasets.enable_progress_bars()


def _cause(error: BaseException, label: str) -> DataError:
    """The DataError that datasets wrapped while it wrote the rows, or one of ours around what it says."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, DataError):
            return inner
        deepest, inner = inner, inner.__cause__
    return DataError(
        f"the prepared rows of {label} cannot be written to datasets' cache",
        why=f"{type(deepest).__name__}: {deepest}",
        fix="free some space, or set HF_DATASETS_CACHE to a folder that can be written, on a disk with room",
    )
