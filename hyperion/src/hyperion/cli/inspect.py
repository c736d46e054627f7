"""`hyperion inspect`: what is in a model, an adapter or an artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from hyperion.inspection.adapter import AdapterPart
    from hyperion.inspection.report import Inspection, ModelPart

_MOST_VERSIONS = 12


def inspect(
    model: str = typer.Argument(help="A model folder, a GGUF file, an adapter's folder, an artifact, or a hub id."),
    revision: str = typer.Option(None, "--revision", help="Revision of a hub model."),
    modules: bool = typer.Option(False, "--modules", help="List every module."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON, every module in it."),
) -> None:
    """Show bits by module, bytes, quantization, adapter and versions of what lies here. Loads nothing."""
    from hyperion.inspection.report import inspect_model

    found = inspect_model(model, revision)
    if as_json:
        from .json_output import print_json

        print_json(found.as_data(), ensure_ascii=False)
        return
    _show(found, modules=modules)


def _show(found: Inspection, *, modules: bool) -> None:
    from hyperion_core.errors import printable
    from rich.table import Table
    from rich.text import Text

    from .console import out

    rows = [("path", str(found.path))]
    rows += _model_rows(found.model) if found.model else []
    rows += _adapter_rows(found.adapter) if found.adapter else []
    rows.append(("bytes on disk", f"{_mb(found.nbytes)}: " + _listed(found.files, _mb)))
    if found.bit_plan:
        counts = ", ".join(f"{count} of {bits}" for bits, count in found.bit_plan.items())
        rows.append(("bit plan", f"bits by module: {counts}"))
    if found.parity:
        rows.append(("parity", _figures(found.parity.get("figures", found.parity))))
    if found.metrics:
        rows.append(("metrics", _figures(found.metrics)))
    if found.versions:
        rows.append(("made with", ", ".join(f"{name} {version}" for name, version in _some(found.versions))))
    if found.changed is not None:
        rows.append(("files", "as they were written" if not found.changed else f"CHANGED: {', '.join(found.changed)}"))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold cyan")
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, Text(printable(text), style="bold yellow" if text.startswith("CHANGED") else ""))
    console = out()
    console.print(table)
    if modules and found.model:
        each = Table("module", "kind", "shape", "bits", "group", "stored", "bytes", box=None, pad_edge=False)
        for module in found.model.modules:
            bits = "?" if module.bits is None else f"{'' if module.exact else '~'}{module.bits:.3g}"
            shape = "×".join(map(str, module.shape)) or "?"
            cells = (module.name, module.kind, shape, bits, str(module.group_size or "-"), module.stored)
            each.add_row(*map(Text, map(printable, cells)), f"{module.nbytes:,}")
        console.print()
        console.print(each)


def _model_rows(model: ModelPart) -> list[tuple[str, str]]:
    from hyperion.inspection.modules import summed

    sizes = [f"{model.layers} layers"] if model.layers else []
    sizes += [f"{model.hidden_size} wide"] if model.hidden_size else []
    sizes += [f"{model.vocab_size:,} tokens"] if model.vocab_size else []
    sizes += [f"context {model.context_length:,}"] if model.context_length else []
    sizes += ["tied embeddings"] if model.tied_embeddings else []
    rows = [("architecture", " ".join(part for part in (model.architecture, f"({model.model_type})") if part))]
    rows += [("sizes", ", ".join(sizes))] if sizes else []
    rows.append(("parameters", f"{model.parameters:,}" if model.parameters is not None else f"unknown: {model.why}"))
    if model.pickles:
        rows.append(("weights", f"pickled, and not read: {', '.join(model.pickles)}"))
    if model.quantization:
        saved = model.quantization
        reader = f"read by {saved.reader} of {saved.owner}" if saved.reader else ""
        rows.append(("quantization", "; ".join(part for part in (saved.method, reader, saved.unread) if part)))
        rows.append(("its config", _given(saved.config, leave_out="quant_method")))
    kinds = summed(model.modules)
    lines = [f"{kind.described}, {_mb(kind.nbytes)}" for kind in kinds]
    if model.mean_bits is not None and sum(kind.kind == "linear" for kind in kinds) > 1:
        lines.append(f"mean of the linear ones: {model.mean_bits:.2f} bits")
    rows += [("bits", "\n".join(lines))] if lines else []
    rows += [("stored as", _listed(model.dtypes, _mb))] if model.dtypes else []
    return rows


def _adapter_rows(adapter: AdapterPart) -> list[tuple[str, str]]:
    what = adapter.type + (f"  ({adapter.owner})" if adapter.owner else "")
    base = adapter.base_model or "not said"
    rows = [("adapter", what), ("base", base + (f" at {adapter.revision}" if adapter.revision else ""))]
    if adapter.ranks:
        one = len(adapter.ranks) == 1
        rank = str(*adapter.ranks) if one else ", ".join(f"{rank} ({n}×)" for rank, n in adapter.ranks.items())
        rows.append(("rank", rank + (f", alpha {adapter.alpha:g}" if adapter.alpha is not None else "")))
    if adapter.targets:
        rows.append(("on", f"{sum(adapter.targets.values())} modules: {_listed(adapter.targets, str)}"))
    if adapter.unread:
        rows.append(("its weights", f"pickled, and not read: {', '.join(adapter.unread)}"))
    else:
        rows.append(("its parameters", f"{adapter.parameters:,} ({', '.join(adapter.dtypes)})"))
    if adapter.quantization:
        options = _given(adapter.quantization, leave_out="method")
        rows.append(("on a base in", f"{adapter.quantization.get('method')} ({options})"))
    if adapter.new_tokens:
        rows.append(("new tokens", f"{len(adapter.new_tokens)}: {_short(', '.join(adapter.new_tokens))}"))
    return rows


def _given(options: Any, *, leave_out: str) -> str:
    told = {key: value for key, value in options.items() if key != leave_out and value is not None}
    return ", ".join(f"{key}: {_short(value)}" for key, value in told.items())


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes:,} bytes"


def _listed(counts: Any, shown: Any) -> str:
    return ", ".join(f"{name} {shown(count)}" for name, count in counts.items())


def _figures(figures: Any) -> str:
    plain = {name: value for name, value in figures.items() if isinstance(value, (int, float, str, bool))}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in plain.items()
    )


def _short(value: Any, most: int = 80) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _some(versions: Any) -> list[tuple[str, str]]:
    return list(versions.items())[:_MOST_VERSIONS]
