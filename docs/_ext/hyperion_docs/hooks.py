"""The reference of hooks, from the specifications."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass

from hyperion_core import specs
from hyperion_core.kinds import KINDS, Plugin

from .markdown import prose, sentence


@dataclass(frozen=True)
class Hook:
    """One hook: its signature as the page of specifications has it, without `self`."""

    name: str
    signature: str
    doc: str
    required: bool


def hooks(kind: type[Plugin]) -> list[Hook]:
    """The hooks of one kind, in their order."""
    source = ast.parse(inspect.getsource(kind.hooks)).body[0]
    assert isinstance(source, ast.ClassDef)
    signatures = {node.name: node for node in source.body if isinstance(node, ast.FunctionDef)}
    required = specs.required_hooks(kind.hooks)
    return [
        Hook(
            name,
            _signature(signatures[name]),
            inspect.cleandoc(vars(kind.hooks)[name].__doc__ or "").removeprefix("★").strip(),
            name in required,
        )
        for name in specs.hook_names(kind.hooks)
    ]


def render() -> str:
    parts = []
    for kind in KINDS:
        parts += [f"## {kind.kind}", f"Entry-point group `{kind.group}`. {sentence(kind.hooks.__doc__ or '')}"]
        for hook in hooks(kind):
            star = " ★" if hook.required else ""
            parts += [f"### {hook.name}{star}", f"```python\n{hook.signature}\n```", prose(hook.doc)]
    return "\n\n".join(parts)


def _signature(node: ast.FunctionDef) -> str:
    node.args.args = node.args.args[1:]
    arguments = [ast.unparse(argument) for argument in node.args.args]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({', '.join(arguments)}){returns}"
    if len(line) <= 96:
        return line
    inside = "\n".join(f"    {argument}," for argument in arguments)
    return f"{node.name}(\n{inside}\n){returns}"
