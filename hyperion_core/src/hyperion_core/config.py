"""Strict config models: an unknown key is refused, every error is reported at once, in the user's words.

Plugins derive their options from `AdapterConfig`, `QuantizationConfig` or `PluginConfig`:

    class RankOneConfig(AdapterConfig):
        type: str = "rank-one"
        scale: PositiveFloat = 1.0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType
from typing_extensions import Self

from .errors import ConfigError, Problem
from .refusals import UNKNOWN_KEY_WHY, explained, shown
from .suggest import did_you_mean

_UNKNOWN_KEY = "hyperion_unknown_key"
_PROBLEM = "hyperion_problem"
_PYDANTIC_KINDS = frozenset(get_args(ErrorType))


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses unknown keys and does not coerce types.

    Raises:
        ConfigError: on construction, with every problem at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=False, allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(problems_of(error), source=type(self).__name__) from error

    # pydantic would call an overridden __init__ for nested models too, and the ConfigError it raises would hide
    # the other fields' errors; this mark, which pydantic's own __init__ bears, keeps validation in the core.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def contradictions(cls, data: Mapping[str, Any]) -> list[Problem]:
        """What is wrong between keys, whatever is wrong with each of them. `data` is as the user gave it."""
        return []

    @classmethod
    def allowed_keys(cls) -> list[str]:
        """Keys that this model takes."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def meant_by(cls, key: str) -> str:
        """What to do with a key that this model does not take: a fix line."""
        return did_you_mean(key, cls.allowed_keys())

    @classmethod
    def parse(cls, data: Any, *, source: str = "") -> Self:
        """Validate plain data.

        Raises:
            ConfigError: with every problem at once.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(problems_of(error), source=source or cls.__name__) from error

    def given(self) -> dict[str, Any]:
        """The keys that the user set, and their values."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    @model_validator(mode="wrap")
    @classmethod
    def _collect(cls, data: Any, handler: Callable[[Any], Self]) -> Self:
        lines: list[InitErrorDetails] = []
        result = None
        try:
            result = handler(data)
        except ValidationError as error:
            lines = [cls._in_our_words(line) for line in error.errors(include_url=False)]
        if isinstance(data, Mapping):
            found = cls.contradictions(data)
            explained = {(problem.path,) for problem in found}
            lines = [line for line in lines if not (_is_unknown_key(line) and line["loc"] in explained)]
            lines += [as_line_error(problem, data) for problem in found]
        if lines:
            raise ValidationError.from_exception_data(cls.__name__, lines)
        assert result is not None
        return result

    @classmethod
    def _in_our_words(cls, line: Any) -> InitErrorDetails:
        kind: Any = line["type"]
        if kind == "extra_forbidden" and len(line["loc"]) == 1:
            fix = cls.meant_by(str(line["loc"][0]))
            kind = PydanticCustomError(_UNKNOWN_KEY, "unknown key", {"fix": fix})
        elif kind not in _PYDANTIC_KINDS:  # one of ours, or one that a plugin's own validator raised
            kind = PydanticCustomError(kind, line["msg"], line.get("ctx"))
        details: InitErrorDetails = {"type": kind, "loc": tuple(line["loc"]), "input": line["input"]}
        if isinstance(kind, str) and "ctx" in line:
            details["ctx"] = line["ctx"]
        return details


def _is_unknown_key(line: InitErrorDetails) -> bool:
    return isinstance(line["type"], PydanticCustomError) and line["type"].type == _UNKNOWN_KEY


def as_line_error(problem: Problem, data: Any) -> InitErrorDetails:
    """A problem as one of pydantic's line errors, so that it is reported beside the others."""
    context = {"what": problem.what, "why": problem.why, "fix": problem.fix}
    error = PydanticCustomError(_PROBLEM, "refused", context)
    loc = tuple(int(part) if part.isdigit() else part for part in problem.path.split(".") if part)
    return {"type": error, "loc": loc, "input": data}


def raise_problems(problems: list[Problem]) -> None:
    """Inside a pydantic validator: refuse with these problems, paths relative to the validated value."""
    if problems:
        raise ValidationError.from_exception_data("config", [as_line_error(problem, None) for problem in problems])


def problems_of(error: ValidationError) -> list[Problem]:
    """What pydantic found, in the user's words."""
    found = []
    for line in error.errors(include_url=False):
        path = ".".join(str(part) for part in line["loc"] if not _is_union_branch(part))
        context = line.get("ctx", {})
        if line["type"] == _UNKNOWN_KEY:
            found.append(Problem(path, f'unknown key "{line["loc"][-1]}"', UNKNOWN_KEY_WHY, context["fix"]))
        elif line["type"] == _PROBLEM:
            found.append(Problem(path, context["what"], context["why"], context["fix"]))
        elif line["type"] == "missing":
            found.append(Problem(path, f'"{line["loc"][-1]}" is missing', "it has no default", "add it"))
        else:
            found.append(Problem(path, f"{shown(line['input'])} is refused", *explained(line)))
    return _one_for_each_path(found)


def _is_union_branch(part: int | str) -> bool:
    # pydantic puts the branch of a union into the path: "str", "list[str]", "constrained-int", "function-wrap[...]"
    return isinstance(part, str) and (
        part in {"str", "int", "float", "bool", "dict"} or part.startswith("constrained-") or "[" in part
    )


def _one_for_each_path(problems: list[Problem]) -> list[Problem]:
    """The branches of a union fail each on their own: one problem that gives all the reasons."""
    merged: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        key = (problem.path, problem.what)
        if key in merged:
            old = merged[key]
            why, fix = _either(old.why, problem.why), _either(old.fix, problem.fix)
            problem = Problem(old.path, old.what, why, fix)
        merged[key] = problem
    return list(merged.values())


def _either(one: str, other: str) -> str:
    return one if not other or other in one else f"{one}; or {other}" if one else other


class PluginConfig(StrictModel):
    """Options of a plugin. `type` names the plugin: "lora", or "acme-lora:lora" where two distributions have one."""

    type: str = Field("", description='The plugin\'s name, or "distribution:name".')


class AdapterConfig(PluginConfig):
    """Options that every adapter has."""


class CalibrationConfig(StrictModel):
    """What is measured on before weights are rounded: rows of the run's own training data, unless `dataset` names
    other ones."""

    dataset: str | None = Field(None, min_length=1, description="A path, a hub id, or package://module/file.")
    rows: PositiveInt = Field(128, description="Rows, at most.")
    max_length: PositiveInt = Field(512, description="Tokens of a row, at most.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the choice of rows.")


class QuantizationConfig(StrictModel):
    """Options that every quantizer has; a method's own options live in its plugin's model, derived from this one.

    A quantizer is given a `BitPlan` beside its config and goes by that: `bits` may be "auto".

    Example: `QuantizationConfig(bits=4, group_size=128, double_quant=True)`.
    """

    method: str | None = Field(None, description="The quantizer's name; None takes one that can do the rest.")
    bits: Annotated[int, Field(ge=1, le=16)] | Literal["auto"] = Field(
        4, description='Bits a weight; "auto" gives each module its own.'
    )
    group_size: PositiveInt | None = Field(None, description="Weights that share a scale; None is the method's own.")
    double_quant: bool | None = Field(None, description="Quantize the scales too; None is the method's own default.")
    target_bits: Annotated[float, Field(gt=0, le=16)] | None = Field(
        None, description="With bits: auto, take the bytes that so many bits everywhere would take."
    )
    budget_mb: PositiveFloat | None = Field(
        None, description="With bits: auto, take so many MB (10^6 bytes) for the whole model."
    )
    bit_plan: str | None = Field(None, min_length=1, description="A file of bits by module, in place of bits.")
    calibration: CalibrationConfig | None = Field(None, description="What is measured on; None is the default rows.")

    _why_chosen: str = PrivateAttr("")

    #: Of the keys that not every method has a notion of, group_size and double_quant, those that this one has.
    understood: ClassVar[frozenset[str]] = frozenset({"group_size", "double_quant"})

    @property
    def why_chosen(self) -> str:
        """Why it is this method, where the user named none."""
        return self._why_chosen

    def chosen_because(self, why: str) -> Self:
        """The same options, whose method was chosen for that reason."""
        chosen = self.model_copy()
        chosen._why_chosen = why
        return chosen

    @field_validator("target_bits", "budget_mb", mode="before")
    @classmethod
    def _whole_numbers_too(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_serializer(mode="wrap")
    def _as_it_can_be_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        if self.bit_plan is not None:
            data.pop("bits", None)  # its default, which would be refused beside the file
        return data

    @classmethod
    def contradictions(cls, data: Mapping[str, Any]) -> list[Problem]:
        given = {key for key, value in data.items() if value is not None}
        found = [
            Problem(key, f'"{key}" means nothing to this method', "the quantizer has no such notion", "leave it out")
            for key in sorted(given & {"group_size", "double_quant"} - cls.understood)
        ]
        targets = sorted(given & {"target_bits", "budget_mb"})
        if "bit_plan" in given:
            why = "the file says how many bits each module has, and in groups of how many weights"
            found += [
                Problem(key, f'"{key}" stands beside bit_plan', why, "leave one of the two out")
                for key in ("bits", *sorted(given & {"group_size"} & cls.understood), *targets)
                if key in given
            ]
        elif data.get("bits") == "auto":
            if len(targets) != 1:
                what = "bits: auto has no budget" if not targets else "bits: auto has two budgets"
                why = "the bits are shared out under one"
                found.append(Problem("bits", what, why, "set target_bits (say 3.5) or budget_mb"))
        else:
            why = "there is nothing to share out where all modules have the same bits"
            found += [
                Problem(key, f'"{key}" needs bits: auto', why, "set bits: auto, or leave it out") for key in targets
            ]
        return found
