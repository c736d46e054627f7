"""Templates of instruction data: text with one named field, filled by replacing that field and nothing else.

Nothing in a template or in the data is ever evaluated, so braces, percent signs and backslashes mean themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from hyperion_core.errors import Problem

TEMPLATE_FIELDS = ("instruction", "input", "output")

DEFAULT_INSTRUCTION_TEMPLATE = "Task:\n{instruction}\n"
DEFAULT_INPUT_TEMPLATE = "Input:\n{input}\n"
DEFAULT_OUTPUT_TEMPLATE = "Answer:\n{output}"


@dataclass(frozen=True, slots=True)
class Template:
    """A text around one field: what stands `before` it and `after` it."""

    before: str
    after: str

    def fill(self, value: str) -> str:
        return f"{self.before}{value}{self.after}"


def parse_template(text: str, field: str) -> Template:
    """Splits a template that `template_problem` has accepted at its field."""
    before, _, after = text.partition(f"{{{field}}}")
    return Template(before, after)


def template_problem(text: object, field: str) -> Problem | None:
    """What is wrong with the template of `field`: it must hold `{field}` exactly once, and no other row field."""
    path = f"{field}_template"
    if not isinstance(text, str):
        return Problem(path, f"must be a text, not {type(text).__name__}", "a row's text is put into it",
                       f'for example "{{{field}}}"')  # fmt: skip
    own = text.count(f"{{{field}}}")
    foreign = [f"{{{other}}}" for other in TEMPLATE_FIELDS if other != field and f"{{{other}}}" in text]
    if own == 1 and not foreign:
        return None
    whys = [] if own == 1 else [f"it holds {{{field}}} {own} times" if own else f"it holds no {{{field}}}"]
    if foreign:
        whys.append(f"it holds {' and '.join(foreign)}, which would stay as it is")
    return Problem(
        path,
        f"must hold {{{field}}} exactly once, and no other field: {text!r}",
        why="; ".join(whys),
        fix="each of the instruction, input and output templates has its own field",
    )


@dataclass(frozen=True, slots=True)
class InstructionTemplates:
    """The three blocks of an instruction row. They are joined by a newline.

    The part of `output` that stands before its field still belongs to the prompt: a model that is asked is given
    it, and so it is not learnt. What follows the field (a closing tag, say) is learnt with the answer.
    """

    instruction: Template
    input: Template
    output: Template

    @classmethod
    def of(cls, instruction: str | None, input: str | None, output: str | None) -> InstructionTemplates:
        """From template texts; None is the default one."""
        return cls(
            parse_template(DEFAULT_INSTRUCTION_TEMPLATE if instruction is None else instruction, "instruction"),
            parse_template(DEFAULT_INPUT_TEMPLATE if input is None else input, "input"),
            parse_template(DEFAULT_OUTPUT_TEMPLATE if output is None else output, "output"),
        )

    def prompt(self, instruction: str, input: str | None) -> str:
        """Everything before the answer. The input block is left out when there is no input."""
        blocks = [self.instruction.fill(instruction)]
        if input is not None:
            blocks.append(self.input.fill(input))
        return "\n".join([*blocks, self.output.before])

    def answer(self, output: str) -> str:
        """What the model is to learn."""
        return f"{output}{self.output.after}"
