"""Configs that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .case import Case, Place

Arrange = Callable[[Place], list[str]]


def changed(**changes: Any) -> Arrange:
    """Validate a config that is right but for this."""
    return lambda place: ["validate", place.config(**changes)]


def file(content: str | bytes, name: str = "config.yaml") -> Arrange:
    """Validate a file of this content."""

    def arrange(place: Place) -> list[str]:
        place.rows()
        place.write(name, content)
        return ["validate", name]

    return arrange


def _nearly_that_name(place: Place) -> list[str]:
    place.config()
    return ["validate", "confg.yaml"]


def _a_folder(place: Place) -> list[str]:
    place.config("runs/first.yaml")
    return ["validate", "runs"]


def _the_data(place: Place) -> list[str]:
    place.write("rows.jsonl", '{"prompt": "Why?", "completion": "Because."}\n' * 25_000)
    return ["validate", "rows.jsonl"]


VALID = """\
base_model: owner/model
adapter:
  type: lora
dataset: rows.jsonl
"""
BOMB = "base_model: owner/model\na: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def case(what: str, arrange: Arrange, *says: str) -> Case:
    return Case("config", what, arrange, says)


CASES: tuple[Case, ...] = (
    # The file.
    case("the file's name is misspelt", _nearly_that_name, "there is no such file", "did you mean config.yaml?"),
    case("its folder does not exist", lambda place: ["validate", "no/such/config.yaml"],
         "no/such/config.yaml: there is no such file", "there is no folder no/such"),
    case("a folder is given", _a_folder, "the file cannot be read", "it is a folder", "runs/first.yaml"),
    case("the data is given in place of the config", _the_data, "rows.jsonl: the file is too large for a config",
         "was this the data?"),
    case("the file is empty", file(""), "config.yaml:1: the file is empty", "start with: base_model"),
    case("the file is a list", file("- base_model: owner/model\n"), "holds no mapping", "this is a list"),
    case("the file is a binary one", file(b"\x89PNG\r\n\x1a\n\x00\x01"), "config.yaml:1: the file is not UTF-8 text"),
    case("the file is UTF-16", file(VALID.encode("utf-16")), "it is UTF-16", "save it as UTF-8"),
    case("an accent in Latin-1", file(VALID.encode() + "output_dir: café".encode("latin-1")),
         "config.yaml:5: the file is not UTF-8 text", "byte 0xe9"),
    case("it is indented with a tab", file("adapter:\n\ttype: lora\n"), "config.yaml:2: the file is not valid YAML",
         "indent with spaces"),
    case("a quote is not closed", file(VALID + 'output_dir: "runs/1\n'), "the file is not valid YAML", "quotes"),
    case("JSON with a missing comma", file('{\n "base_model": "owner/model"\n "adapter": "lora"\n}', "config.json"),
         "config.json:3: the file is not valid JSON"),
    case("a key stands twice", file(VALID + "dataset: other.jsonl\n"), 'config.yaml:5: the key "dataset" stands twice',
         "remove one"),
    case("a key that YAML takes for a number", file(VALID + "8: rank\n"), "config.yaml:5: the key 8 is not a word"),
    case("aliases of aliases of aliases", file(BOMB), "the file holds too much", "counting what aliases repeat"),
    case("a merge key", file("a: &a {type: lora}\nadapter:\n  <<: *a\n"), "config.yaml:3: << is not read",
         "write the keys out"),
    case("it is nested a thousand deep", file("base_model: " + "[" * 1000),
         "config.yaml:1: the file is nested too deep"),
    case("a tag that would run code", file(VALID + "output_dir: !!python/object/apply:os.getcwd []\n"),
         "config.yaml:5: the file is not valid YAML", "python/object/apply:os.getcwd"),
    case("a terminal's control characters in a value", file(VALID + 'dtype: "\\e[2J\\e[31mowned"\n'),
         "config.yaml:5: dtype", "\\x1b[2J"),
    # Keys.
    case("a key is misspelt", changed(base_modle="x"), 'base_modle: unknown key "base_modle"', 'mean "base_model"?'),
    case("trust_remote_code is misspelt", changed(trust_remotecode=True), 'did you mean "trust_remote_code"?'),
    case("a key of training is misspelt", changed(training={"learning_rat": 1e-4}),
         'config.yaml:15: training.learning_rat: unknown key "learning_rat"', 'did you mean "learning_rate"?'),
    case("a key of the adapter is misspelt", changed(adapter={"target_module": ["q_proj"]}), "adapter.target_module",
         'did you mean "target_modules"?'),
    case("a key of the dataset is misspelt", changed(dataset={"formt": "chat"}), 'did you mean "format"?'),
    case("a key of the scheduler is misspelt", changed(training={"lr_scheduler": {"type": "cosine", "num_cycle": 1}}),
         "training.lr_scheduler.num_cycle", 'did you mean "num_cycles"?'),
    case("a key is in the wrong place", changed(learning_rate=1e-4),
         'unknown key "learning_rate"', "put it under training:"),
    case("base_model and adapter are missing", changed(base_model=..., adapter=...), 'has 2 problems',
         '"base_model" is missing', '"adapter" is missing', "add it"),
    case("a newer version of the format", changed(version=2), "version 2 is a newer format", "upgrade hyperion-ft"),
    # Values.
    case("a number in quotes", file(VALID + 'training: {learning_rate: "2e-4"}\n'),
         "training.learning_rate: '2e-4' is refused", "a number is wanted", "without quotes"),
    case("words in place of a number", changed(training={"max_steps": "many"}), "training.max_steps: 'many'"),
    case("part of a row in a batch", changed(training={"per_device_train_batch_size": 1.5}), "1.5 is refused",
         "a whole number is wanted"),
    case("a negative batch size", changed(training={"per_device_train_batch_size": -4}), "-4 is refused",
         "it must be greater than 0"),
    case("a learning rate that is no number", file(VALID + "training: {learning_rate: .nan}\n"), "nan is refused",
         "infinity and NaN are no settings"),
    case("endless epochs", file(VALID + "training: {num_train_epochs: .inf}\n"), "inf is refused", "finite"),
    case("a number of 500 digits", file(VALID + "training: {seed: " + "9" * 500 + "}\n"), "config.yaml:5",
         "a number of 500 digits"),
    case("a key without a value", changed(training={"per_device_train_batch_size": None}), "nothing (null) is refused",
         "or leave the key out"),
    case("yes, which YAML 1.2 takes for a word", file(VALID + "training: {bf16: yes}\n"), "training.bf16: 'yes'",
         "write true or false"),
    case("text where a mapping belongs", changed(training="fast"), "training: 'fast' is refused",
         "write it as a mapping"),
    case("a dtype by another name", changed(dtype="fp16"), "dtype: 'fp16' is refused",
         "it is one of: auto, float32, bfloat16, float16"),
    case("all rows for validation", changed(dataset={"validation_split": 1.0}), "dataset.validation_split: 1.0",
         "less than 1"),
    case("no training steps", changed(training={"max_steps": 0}), "0 steps train nothing", "-1"),
    case("a new token twice", changed(new_tokens=["<a>", "<a>"]), 'new_tokens: "<a>" stands twice', "leave it out"),
    # The adapter, and the model under it.
    case("r: 0", changed(adapter={"r": 0}), "adapter.r: 0 is refused", "greater than 0"),
    case("a rank that no module has", changed(adapter={"r": 1_000_000}), "r: 1000000 is more than any module has",
         "32 or less"),
    case("target_modules of another architecture", changed(adapter={"target_modules": ["query", "value"]}),
         "tiny-model has no module called 'query', 'value'", "name some of", "q_proj"),
    case("target_modules that are no regular expression", changed(adapter={"target_modules": "(q_proj"}),
         "adapter.target_modules", "correct it"),
    case("no target_modules at all", changed(adapter={"target_modules": []}), "target_modules is empty", "all-linear"),
    case("an option of PEFT that would change the base", changed(adapter={"init_lora_weights": "loftq"}),
         'the initialisation "loftq" cannot be used', "must stay as it is"),
    case("an adapter without a name", changed(adapter={"type": ...}), '"type" is missing', "lora"),
    # Choices that do not go together.
    case("two kinds of warmup", changed(training={"warmup_ratio": 0.1, "warmup_steps": 1}),
         '"warmup_ratio" and "warmup_steps" stand together', "keep one of them"),
    case("bf16 and fp16", changed(training={"bf16": True, "fp16": True}), "autocast has one type"),
    case("fp16 on a machine without a GPU", changed(training={"fp16": True, "use_cpu": True}),
         "training.fp16: fp16 works on CUDA GPUs only", "leave it out"),
    case("early stopping without evaluation", changed(training={"early_stopping_patience": 2},
         dataset={"validation_split": 0}), "early_stopping_patience does nothing", "set dataset.validation_split"),
    case("more tokens than the model reads", changed(training={"max_length": 100_000}),
         "training.max_length: 100000 tokens are more", "its context is 512 tokens"),
    case("an option of TrainingArguments that would do nothing", changed(training={"torch_compile": True}),
         'training.torch_compile: "torch_compile" is not taken', "leave it out"),
    case("a token for the hub in the config", changed(training={"hub_token": "hf_secret"}), "hf auth login"),
    case("output_dir inside training", changed(training={"output_dir": "out"}), "at the top of the config"),
    case("an unknown optimizer", changed(training={"optim": "adamw_troch"}), 'did you mean "adamw_torch"?'),
    case("an optimizer that is not installed", changed(training={"optim": "grokadamw"}),
         "python -m pip install grokadamw"),
    case("several faults at once", changed(base_model=..., dtype="int3", training={"seed": -1, "epochs": 3}),
         "has 4 problems", "base_model", "dtype", "training.seed", "training.epochs"),
)  # fmt: skip
