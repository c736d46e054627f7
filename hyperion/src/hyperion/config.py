"""`FinetuneConfig`: one model for Python and for YAML, strict, every error at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from hyperion_core.config import (
    AdapterConfig,
    PluginConfig,
    QuantizationConfig,
    StrictModel,
    problems_of,
    raise_problems,
)
from hyperion_core.config_file import ConfigFile, read_config_file
from hyperion_core.errors import ConfigError, HyperionError, PluginError, Problem
from hyperion_core.kinds import Plugin, with_article
from hyperion_core.registry import registry
from pydantic import Field, PositiveInt, PrivateAttr, ValidationError, field_validator

from .data.audit.config import AuditConfig
from .quantization.choice import choose_method
from .refused_arguments import tracker_fix
from .training_config import TrainingConfig


class DatasetConfig(StrictModel):
    """`dataset:` as a mapping: the arguments of `hyperion.data.DatasetProcessor`."""

    dataset: str = Field(description="A path, a hub id, or package://module/file.")
    format: Literal["auto", "instruction", "completion", "chat", "text"] = Field("auto", description="Shape of a row.")
    instruction_template: str | None = Field(None, description="Wraps {instruction}.")
    input_template: str | None = Field(None, description="Wraps {input}; vanishes where a row has none.")
    output_template: str | None = Field(None, description="Wraps {output}; what precedes {output} is not learnt.")
    system: str | None = Field(None, description="System message, for format: chat.")
    chat_template: str | None = Field(
        None, min_length=1, description="Jinja text, or path of a .jinja file, in place of the model's."
    )
    columns: dict[str, str] | None = Field(None, description="Our field name: the column's name in the data.")
    split: str = Field("train", description="Split of a hub dataset.")
    name: str | None = Field(None, description="Configuration of a hub dataset.")
    revision: str | None = Field(None, description="Revision of a hub dataset.")
    sample_limit: PositiveInt | None = Field(None, description="Rows used, at most.")
    validation_split: Annotated[float, Field(ge=0, lt=1)] | PositiveInt = Field(
        0.0, description="Share, or number, of the rows to evaluate on."
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Of the shuffle behind sample_limit and validation_split.")


class FinetuneConfig(StrictModel):
    """What to tune, how, and on what.

    Example:
        `FinetuneConfig(base_model="HuggingFaceTB/SmolLM2-135M", adapter=LoraConfig(r=16))`

    Raises:
        ConfigError: with every problem at once.
    """

    version: Literal[1] = Field(1, description="Version of this format.")
    base_model: str = Field(min_length=1, description="A hub id, a folder, a GGUF file, or package://module/file.")
    revision: str | None = Field(None, description="Revision of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Of the base's weights.")
    adapter: AdapterConfig = Field(description="What is trained: `type` names the plugin.")
    quantization: QuantizationConfig | None = Field(
        None, description="How the base is held: `method` names the plugin."
    )
    dataset: DatasetConfig | None = Field(None, description="A path or id, or a mapping.")
    objective: PluginConfig = Field(
        default_factory=lambda: "sft",
        validate_default=True,
        description="What is learnt from a row: a name, or a mapping with `type`.",
    )
    audit: AuditConfig = Field(default_factory=AuditConfig, description="What is refused of the data before training.")
    new_tokens: list[str] = Field(default_factory=list, description="Tokens to add to the vocabulary and train.")
    quality: Literal["auto"] | None = Field(
        None, description="auto: what adapter and training leave out is set as the adapter's plugin recommends."
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How it is trained.")
    plugins: list[str] = Field(default_factory=list, description="Observers of the run, by name.")
    output_dir: str | None = Field(None, min_length=1, description="Where the run goes; --output_dir overrides it.")

    _file: ConfigFile | None = PrivateAttr(None)

    @classmethod
    def from_file(cls, path: str | Path) -> FinetuneConfig:
        """Read YAML or JSON. Relative paths in it are relative to its folder.

        Raises:
            ConfigError: with every problem at once, each with file:line.
        """
        file = read_config_file(path)
        try:
            config = cls.parse(file.data, source=str(path))
        except ConfigError as error:
            raise ConfigError(file.located(error.problems), source=str(path)) from error
        config._file = file
        return config

    @classmethod
    def meant_by(cls, key: str) -> str:
        for section, model in (("training", TrainingConfig), ("dataset", DatasetConfig), ("audit", AuditConfig)):
            if key in model.allowed_keys():
                return f"put it under {section}:"
        return super().meant_by(key)

    @property
    def file(self) -> Path | None:
        """Where it was read from; None when it was made in Python."""
        return self._file.path if self._file else None

    @property
    def base_dir(self) -> Path | None:
        """The folder that relative paths start from; None is the working directory."""
        return self._file.path.resolve().parent if self._file else None

    def __eq__(self, other: object) -> bool:
        """Two configs are equal when they say the same, wherever they were read from."""
        return isinstance(other, FinetuneConfig) and self.as_data() == other.as_data()

    def replace(self, **changes: Any) -> FinetuneConfig:
        """Another config, with some keys changed and everything validated again; relative paths stay valid.

        Raises:
            ConfigError: with every problem at once.
        """
        source = str(self._file.path) if self._file else ""
        changed = type(self).parse({**self.given(), **changes}, source=source)
        changed._file = self._file
        return changed

    def refuse(self, problems: list[Problem]) -> None:
        """Raise ConfigError for problems found later than validation, with file:line where there is a file."""
        if problems:
            source = str(self._file.path) if self._file else type(self).__name__
            raise ConfigError(self._file.located(problems) if self._file else problems, source=source)

    def scheduler(self) -> PluginConfig:
        """The scheduler's own config."""
        chosen = _plugin_config("scheduler", self.training.scheduler())
        assert isinstance(chosen, PluginConfig)
        return chosen

    def as_data(self) -> dict[str, Any]:
        """Plain data that `parse` reads back to an equal config."""
        data = self.model_dump(mode="json", exclude_none=True, serialize_as_any=True)
        data["training"] = {key: value for key, value in data["training"].items() if value is not None}
        if self.training.lr_scheduler_type:
            del data["training"]["lr_scheduler"]  # its default: the two are refused together
        return data

    @field_validator("version", mode="before")
    @classmethod
    def _version(cls, value: Any) -> Any:
        if isinstance(value, int) and value > 1:
            why = "this hyperion reads version 1"
            raise_problems([Problem("", f"version {value} is a newer format", why, "upgrade hyperion-ft")])
        return value

    @field_validator("adapter", mode="wrap")
    @classmethod
    def _adapter(cls, value: Any, handler: Any) -> Any:
        return _plugin_config("adapter", value)

    @field_validator("objective", mode="wrap")
    @classmethod
    def _objective(cls, value: Any, handler: Any) -> Any:
        return _plugin_config("objective", value)

    @field_validator("quantization", mode="wrap")
    @classmethod
    def _quantization(cls, value: Any, handler: Any) -> Any:
        return None if value is None else _quantization_config(value)

    @field_validator("dataset", mode="before")
    @classmethod
    def _dataset(cls, value: Any) -> Any:
        return {"dataset": value} if isinstance(value, str) else value

    @field_validator("training", mode="wrap")
    @classmethod
    def _training(cls, value: Any, handler: Any) -> Any:
        # The scheduler is looked up even where another field of `training` is wrong: every error at once.
        problems, training = [], None
        try:
            training = handler(value)
        except ValidationError as error:
            problems = problems_of(error)
        where, chosen = _scheduler_of(training or value)
        if chosen is not None:
            try:
                _plugin_config("scheduler", chosen)
            except ValidationError as error:
                problems += [problem.at(where) for problem in problems_of(error)]
        raise_problems(problems)
        return training

    @field_validator("plugins", mode="before")
    @classmethod
    def _list_of_observers(cls, value: Any) -> Any:
        if isinstance(value, str):
            fix = tracker_fix(value) or f"plugins: [{value}]"
            raise_problems([Problem("", f"{value!r} is no list", "plugins lists observers by name", fix)])
        return value

    @field_validator("plugins", mode="after")
    @classmethod
    def _observers(cls, value: list[str]) -> list[str]:
        problems, seen = [], set()
        for index, name in enumerate(value):
            try:
                registry().load("observer", name)
            except PluginError as error:
                problems.append(Problem(str(index), error.what, error.why, tracker_fix(name) or error.fix))
                continue
            qualified = registry().find("observer", name).qualified
            if qualified in seen:
                problems.append(
                    Problem(str(index), f'"{name}" stands twice', "an observer is told once", "leave it out")
                )
            seen.add(qualified)
        raise_problems(problems)
        return value

    @field_validator("new_tokens", mode="after")
    @classmethod
    def _new_tokens(cls, value: list[str]) -> list[str]:
        twice = sorted(token for token, times in Counter(value).items() if times > 1)
        bad = [
            *(f'"{token}" stands twice' for token in twice),
            *("an empty token" for token in value if not token.strip()),
        ]
        why = "each token is one new row of the embedding"
        raise_problems([Problem("", what, why, "leave it out") for what in dict.fromkeys(bad)])
        return value


def _plugin_config(kind: str, value: Any) -> StrictModel:
    """The chosen plugin's own config, from a name, a mapping with `type`, or a config object."""
    if isinstance(value, StrictModel):
        name = getattr(value, "type", "")
        if not name:
            raise_problems([Problem("type", f"this {kind} config does not say which {kind} it is for",
                                     "its type is empty", "set type")])  # fmt: skip
        plugin = _load(kind, name)
        if not isinstance(value, plugin.config_class):
            raise_problems([_wrong_class(kind, name, value, plugin)])
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping):
        raise_problems(
            [
                Problem(
                    "",
                    f"{value!r} is refused",
                    f"{with_article(kind)} is a mapping with `type`",
                    f"{kind}: {{type: …}}",
                )
            ]
        )
    if not isinstance(value.get("type"), str):
        names = sorted({entry.name for entry in registry().entries(kind)})
        raise_problems(
            [
                Problem(
                    "type",
                    '"type" is missing' if value.get("type") is None else f"type {value['type']!r} is refused",
                    f"it names the plugin that the {kind} comes from",
                    f"say which {kind}: {', '.join(names) or 'none is installed'}",
                )
            ]
        )
    return _validated(kind, value["type"], _load(kind, value["type"]), dict(value))


def _quantization_config(value: Any) -> StrictModel:
    data = value.given() if isinstance(value, QuantizationConfig) else value
    if isinstance(data, str):
        data = {"method": data}
    if not isinstance(data, Mapping):
        raise_problems(
            [
                Problem(
                    "", f"{value!r} is refused", "quantization is a mapping with `method`", "quantization: {method: …}"
                )
            ]
        )
    method, why = data.get("method"), value.why_chosen if isinstance(value, QuantizationConfig) else ""
    if method is None:
        method, why = choose_method(data)
    elif not isinstance(method, str):
        raise_problems([Problem("method", f"{method!r} is refused", "a method is a plugin's name", "method: …")])
    chosen = _validated("quantizer", method, _load("quantizer", method, at="method"), {**data, "method": method})
    assert isinstance(chosen, QuantizationConfig)
    return chosen.chosen_because(why)


def _validated(kind: str, name: str, plugin: type[Plugin], data: dict[str, Any]) -> StrictModel:
    try:
        return plugin.config_class.model_validate(data)
    except (ValidationError, HyperionError):
        raise
    except Exception as error:
        what = f'the {kind} "{name}" of {registry().find(kind, name).whose} failed while it read its options'
        why = f"{plugin.config_class.__name__} raised {type(error).__name__}: {error}"
        fix = f"it is the plugin's fault: tell its authors, or choose another {kind}"
        raise_problems([Problem("", what, why, fix)])
        raise  # raise_problems always raises here; this tells the type checker


def _load(kind: str, name: str, *, at: str = "type") -> type[Plugin]:
    try:
        return registry().load(kind, name)
    except PluginError as error:
        raise_problems([Problem(at, error.what, error.why, error.fix)])
        raise  # raise_problems always raises here; this tells the type checker


def _wrong_class(kind: str, name: str, value: StrictModel, plugin: type[Plugin]) -> Problem:
    return Problem(
        "",
        f'a {type(value).__name__} is no config of the {kind} "{name}"',
        "it belongs to another plugin",
        f"use {plugin.config_class.__module__}.{plugin.config_class.__name__}",
    )


def _scheduler_of(training: Any) -> tuple[str, Any]:
    """Where the scheduler stands, and what it is, of a TrainingConfig or of what was meant to become one."""
    if isinstance(training, TrainingConfig):
        return "lr_scheduler_type" if training.lr_scheduler_type else "lr_scheduler", training.scheduler()
    for key in ("lr_scheduler", "lr_scheduler_type"):
        chosen = training.get(key) if isinstance(training, Mapping) else None
        if isinstance(chosen, (str, Mapping)):
            return key, chosen
    return "", None
