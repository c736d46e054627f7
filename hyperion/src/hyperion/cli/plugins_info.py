"""`hyperion plugins info`: all that there is to know about one plugin."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from hyperion_core.description import ClassFacts, DistributionFacts
    from hyperion_core.doctor import Examination
    from rich.console import Console


def info(
    name: str = typer.Argument(help='The plugin\'s name, or "distribution:name".'),
    kind: str = typer.Option(None, "--kind", help="Only this kind: adapter, scheduler, …"),
    timeout: float = typer.Option(60.0, "--timeout", min=0.1, help="Seconds that the plugin has."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON: a list, as several kinds may have the name."),
) -> None:
    """Show a plugin: whose it is, what it needs, its hooks, options, and YAML to paste; exit code 2 if it is broken."""
    from hyperion_core.description import distribution_facts
    from hyperion_core.doctor import examine
    from hyperion_core.registry import registry

    from .usage import known_kind

    known_kind("hyperion plugins info", kind)
    entries = registry().named(name, kind)
    examinations = sorted(examine(entries, timeout=timeout), key=lambda each: entries.index(each.entry))
    if as_json:
        from .json_output import print_json

        print_json([_data(each, distribution_facts(each.entry)) for each in examinations])
    else:
        for each in examinations:
            _show(each, distribution_facts(each.entry))
    if any(each.state == "problem" for each in examinations):
        raise typer.Exit(2)


def _data(each: Examination, distribution: DistributionFacts) -> dict[str, Any]:
    entry = each.entry
    return {
        "kind": entry.kind,
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "origin": entry.origin,
        "entry_point": entry.value,
        "contract": entry.contract,
        **asdict(distribution),
        "class": asdict(each.facts) if each.facts else None,
        "yaml": _snippet(each),
        "findings": [asdict(finding) for finding in each.findings],
    }


def _show(each: Examination, distribution: DistributionFacts) -> None:
    from hyperion_core import __version__
    from rich.table import Table
    from rich.text import Text

    from .console import out

    console, entry = out(), each.entry
    console.print(Text(f"{entry.kind} {entry.name}", style="bold"))
    contract = "it does not say" if entry.contract is None else f"hyperion-core{entry.contract or ' of any version'}"
    rows = {
        "what": each.facts.summary if each.facts else "",
        "distribution": f"{entry.whose} ({entry.origin})",
        "summary": distribution.summary,
        "licence": distribution.licence,
        "homepage": distribution.homepage,
        "entry point": entry.value,
        "contract": f"{contract}; {__version__} is installed",
        "requires": "\n".join(
            f"{fact.requirement}  ({fact.installed or 'not installed'}{'' if fact.fits else ', does not fit'})"
            for fact in distribution.requirements
        ),
        "declares": ", ".join(f"{key}: {_shown(value)}" for key, value in each.facts.declares.items())
        if each.facts
        else "",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold cyan")
    table.add_column(overflow="fold")
    for label, text in rows.items():
        if text:
            table.add_row(label, Text(text))
    console.print(table)
    if each.facts:
        _show_class(console, each.facts)
    if snippet := _snippet(each):
        console.print("\n[bold]in a config[/bold]")
        console.print(Text(snippet))
    for finding in each.findings:
        console.print()
        console.print(Text(f"{finding.level}: {finding}", style="red" if finding.level == "problem" else "yellow"))


def _show_class(console: Console, facts: ClassFacts) -> None:
    from rich.table import Table
    from rich.text import Text

    hooks = Table("", "hook", "", "when, and what it gives", box=None, pad_edge=False)
    for hook in facts.hooks:
        missing = Text("missing", style="red") if hook.required else Text("-", style="dim")
        there = Text("yes", style="green") if hook.implemented else missing
        hooks.add_row("★" if hook.required else "", Text(hook.name), there, Text(hook.doc))
    console.print("\n[bold]hooks[/bold] (★ required)")
    console.print(hooks)
    options = Table("option", "type", "default", "meaning", box=None, pad_edge=False)
    for option in facts.options:
        default = "required" if option.required else _shown(option.default)
        options.add_row(*map(Text, (option.name, option.type, default, option.description)))
    console.print(f"\n[bold]options[/bold] ({facts.config_class})")
    console.print(options)


def _snippet(each: Examination) -> str:
    from hyperion.snippet import config_snippet

    if each.facts is None:
        return ""
    return config_snippet(each.entry.kind, each.entry.name, each.facts.example, each.facts.needs)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
