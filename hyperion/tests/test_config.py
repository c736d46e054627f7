"""`FinetuneConfig`: one strict model for Python and YAML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hyperion_core.config import AdapterConfig, QuantizationConfig
from hyperion_core.errors import ConfigError

from hyperion import FinetuneConfig, LoraConfig
from hyperion.schema import config_schema

FROZEN = Path(__file__).parent / "configs"


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(**keys) -> str:
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig(**{"base_model": "owner/model", "adapter": {"type": "lora"}, **keys})
    return str(caught.value)


def test_the_specifications_own_config_in_python_and_yaml_is_the_same(tmp_path: Path) -> None:
    in_python = FinetuneConfig(
        base_model="meta-llama/Llama-2-7b-hf",
        adapter=LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        ),
        training=dict(
            learning_rate=2e-4,
            warmup_ratio=0.03,
            weight_decay=0.01,
            gradient_accumulation_steps=4,
            lr_scheduler="cosine",
        ),
    )
    in_yaml = FinetuneConfig.from_file(
        write(
            tmp_path,
            """
            base_model: meta-llama/Llama-2-7b-hf
            adapter: {type: lora, r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj], lora_dropout: 0.05,
                      bias: none, task_type: CAUSAL_LM}
            training: {learning_rate: 2e-4, warmup_ratio: 0.03, weight_decay: 0.01, gradient_accumulation_steps: 4,
                       lr_scheduler: cosine}
            """,
        )
    )
    assert in_python == in_yaml
    assert FinetuneConfig.parse(in_python.as_data()) == in_python


def test_quantization_config_takes_the_specifications_names() -> None:
    config = QuantizationConfig(bits=4, group_size=128, double_quant=True)
    assert (config.bits, config.group_size, config.double_quant) == (4, 128, True)


@pytest.mark.parametrize("path", sorted(FROZEN.glob("*.*")), ids=lambda path: path.name)
def test_files_of_version_1_keep_loading(path: Path) -> None:
    config = FinetuneConfig.from_file(path)
    expected = json.loads((FROZEN / "expected" / f"{path.stem}.json").read_text(encoding="utf-8"))
    changed = dict(flat(expected).items() - flat(config.as_data()).items())
    assert not changed, f"{path.name} means something else now: {changed}"


def flat(data: dict, prefix: str = "") -> dict[str, str]:
    found = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: repr(value)}
    return found


def test_every_error_of_a_file_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "base_model: owner/model\n"
        "adapter:\n"
        "  type: lora\n"
        "  lora_aplha: 32\n"
        "training:\n"
        "  learning_rate: fast\n"
        "  warmup_ratio: 0.1\n"
        "  warmup_steps: 5\n"
        "  lr_scheduler: cosin\n"
        "objektive: sft\n",
    )
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig.from_file(path)
    found = [(problem.source.rpartition(":")[2], problem.path) for problem in caught.value.problems]
    assert found == [
        ("4", "adapter.lora_aplha"),
        ("6", "training.learning_rate"),
        ("7", "training.warmup_ratio"),
        ("9", "training.lr_scheduler.type"),
        ("10", "objektive"),
    ]
    text = str(caught.value)
    assert 'did you mean "lora_alpha"?' in text
    assert "'fast' is refused" in text
    assert 'did you mean "cosine"?' in text
    assert 'did you mean "objective"?' in text


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"adapter": {"type": "loro"}}, 'did you mean "lora"?'),
        ({"adapter": {"r": 8}}, "say which adapter: ia3, lora"),
        ({"adapter": 3}, "an adapter is a mapping with `type`"),
        ({"adapter": {"type": "lora", "r": 0}}, "adapter.r: 0 is refused"),
        ({"adapter": {"type": "lora", "r": True}}, "adapter.r: True is refused"),
        ({"quantization": {"method": "awq", "bits": 4}}, 'no installed distribution has a quantizer called "awq"'),
        ({"objective": "dpoo"}, 'no installed distribution has an objective called "dpoo"'),
        ({"plugins": ["watcher"]}, 'no installed distribution has an observer called "watcher"'),
        ({"new_tokens": ["<a>", "<a>"]}, '"<a>" stands twice'),
        ({"version": 2}, "version 2 is a newer format"),
        ({"dtype": "int8"}, "dtype: 'int8' is refused"),
        ({"dataset": {"dataset": "x", "validation_split": 1.5}}, "dataset.validation_split"),
        ({"training": {"optim": "adamv_torch"}}, 'did you mean "adamw_torch"?'),
        ({"training": {"report_to": "wandbb"}}, 'did you mean "wandb"?'),
        ({"training": {"report_to": ["clearml"]}}, "python -m pip install clearml"),
        ({"training": {"eval_strategy": "step"}}, "training.eval_strategy: 'step' is refused"),
        ({"training": {"metric_for_best_model": "accuracy"}}, "training.metric_for_best_model: 'accuracy' is refused"),
        ({"training": {"eval_steps": 5, "eval_strategy": "epoch"}}, "the steps would never be used"),
        ({"training": {"early_stopping_patience": 2, "eval_strategy": "no"}}, "nothing can stop early"),
        ({"training": {"deepspeed": "x.json"}}, "this version runs one process on one device"),
        ({"training": {"hub_token": "secret"}}, "HF_TOKEN"),
        ({"training": {"hub_model_id": "my model"}}, "is no name of a repository"),
        ({"training": {"hub_model_id": "owner/model.git"}}, "is no name of a repository"),
        ({"training": {"max_steps": -2}}, "training.max_steps: -2 is refused"),
        ({"training": {"max_steps": 0}}, "0 steps train nothing"),
        ({"training": {"warmup_ratio": 1.0}}, "training.warmup_ratio: 1.0 is refused"),
        ({"training": {"lr_scheduler": {"type": "cosine", "cycles": 2}}}, 'unknown key "cycles"'),
        ({"training": {"bf16": True, "fp16": True}}, "autocast has one type"),
        ({"training": {"greater_is_better": True}}, "a loss is better when lower"),
        ({"training": {"warmup_ratio": 0.0, "warmup_steps": 1}}, "they say the same thing twice"),
        ({"training": {"warmup_steps": 1.5}}, "which must be whole"),
        ({"training": {"gradient_checkpointing": True, "activation_checkpointing": True}}, "the same thing twice"),
        ({"training": {"gradient_checkpointing_kwargs": {"use_reentrant": False}}}, "gradient_checkpointing: true"),
        ({"training": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": "no"}}, "'no' is refused"),
        ({"training": {"num_train_epochs": float("inf")}}, "training.num_train_epochs: inf is refused"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate: inf is refused"),
        ({"training": {"adam_beta1": 1.0}}, "training.adam_beta1: 1.0 is refused"),
        ({"training": {"adam_epsilon": 0.0}}, "training.adam_epsilon: 0.0 is refused"),
        ({"training": {"data_seed": -1}}, "training.data_seed: -1 is refused"),
        ({"training": {"dataloader_num_workers": -1}}, "training.dataloader_num_workers: -1 is refused"),
        ({"training": {"dataloader_persistent_workers": True}}, "set dataloader_num_workers"),
        ({"training": {"dataloader_prefetch_factor": 2}}, "set dataloader_num_workers"),
        ({"training": {"log_level": "loud"}}, "training.log_level: 'loud' is refused"),
        ({"training": {"eval_steps": 2.5}}, "which must be whole"),
        ({"training": {"save_steps": 2.5}}, "which must be whole"),
        ({"training": {"logging_steps": 2.5}}, "which must be whole"),
        ({"training": {"logging_steps": 2, "logging_strategy": "epoch"}}, "the steps would never be used"),
        ({"training": {"torch_empty_cache_steps": 0}}, "training.torch_empty_cache_steps: 0 is refused"),
        ({"training": {"run_name": "mine"}}, "report_to names none"),
        ({"training": {"project": "mine", "report_to": "none"}}, "report_to does not name it"),
        ({"training": {"optim": "galore_adamw"}}, '"galore_adamw" cannot train an adapter'),
        ({"training": {"optim": "adalomo"}}, '"adalomo" cannot train an adapter'),
        ({"training": {"optim": "grokadamw"}}, "python -m pip install grokadamw"),
        ({"training": {"optim": "stable_adamw"}}, "python -m pip install torch-optimi"),
        ({"training": {"load_best_model_at_end": True, "eval_strategy": "no"}}, "no model is the best"),
        ({"training": {"save_strategy": "best", "eval_strategy": "no"}}, "no model is the best"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_reason(keys, says) -> None:
    assert says in refused(**keys)


def test_push_to_hub_alone_is_enough() -> None:
    assert FinetuneConfig(base_model="owner/model", adapter="lora", training={"push_to_hub": True})


def test_every_optimizer_that_needs_a_package_is_known_to_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from hyperion_core.foreign import foreign_values

    from hyperion.refused_arguments import argument_problems

    names = foreign_values("transformers", "training_args.py", "OptimizerNames")
    argument_problems({})  # reads transformers' source, while it can be found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = {name: " ".join(map(str, argument_problems({"optim": name}))) for name in names}
    assert {name for name in names if not found[name]} == {
        "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"
    }  # fmt: skip
    for name in ("adamw_8bit", "lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "ademamix"):
        assert "needs bitsandbytes" in found[name] and 'pip install "hyperion-ft[bnb]",' in found[name]
    assert "pip install torchao," in found["adamw_torch_8bit"]
    assert "pip install schedulefree," in found["schedule_free_sgd"]


def test_an_observer_stands_once(registry) -> None:
    from hyperion_core.kinds import Observer

    import hyperion_adapters_lora
    from hyperion_objective_sft import SftObjective
    from hyperion_schedulers import Cosine

    class Watcher(Observer):
        def run_start(self): ...

    registry.add(hyperion_adapters_lora.LoraAdapter, "lora")
    registry.add(SftObjective, "sft")
    registry.add(Cosine, "cosine")
    registry.add(Watcher, "watcher")
    assert 'plugins.1: "in-process:watcher" stands twice' in refused(plugins=["watcher", "in-process:watcher"])


def test_transformers_names_survive_a_round_trip() -> None:
    config = FinetuneConfig(base_model="owner/model", adapter="lora", training={"lr_scheduler_type": "linear"})
    assert FinetuneConfig.parse(config.as_data()) == config


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience does nothing"),
        ({"eval_steps": 5}, "training.eval_steps"),
        ({"eval_strategy": "epoch"}, "training.eval_strategy"),
        ({"eval_delay": 1}, "training.eval_delay"),
        ({"eval_on_start": True}, "training.eval_on_start"),
        ({"load_best_model_at_end": True}, "training.load_best_model_at_end"),
        ({"save_strategy": "best"}, "training.save_strategy"),
        ({"max_length": 4096}, "its context is 512 tokens"),
        ({"fp16": True}, "fp16 works on CUDA GPUs only"),
        ({"fp16": True, "stream_weights": True}, "fp16 does not go with stream_weights"),
        ({"tf32": True}, "tf32 works on CUDA GPUs only"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 16}, "10 rows do not fill a batch of 16"),
        ({"lr_scheduler": "constant", "warmup_ratio": 0.5}, "choose constant_with_warmup"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 1}, "training.lr_scheduler_type"),
        ({"lr_scheduler": {"type": "cosine_with_min_lr", "min_lr": 0.1}}, "training.lr_scheduler.min_lr"),
        ({"lr_scheduler": {"type": "warmup_stable_decay", "num_decay_steps": 50}}, "do not fit into the run"),
    ],
)  # fmt: skip
def test_what_model_data_and_device_rule_out_is_refused_while_planning(
    training, says, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tiny_model, monkeypatch, **training)
    assert says in str(caught.value)


def planned(base: Path, monkeypatch: pytest.MonkeyPatch, held_out: int = 0, device: str = "cpu", **training):
    from hyperion import planning, training_config

    monkeypatch.setattr(training_config, "plan_device", lambda: "cuda")  # a device that is given is not guessed
    config = FinetuneConfig(base_model=str(base), adapter="lora", training=training)
    return planning.make_plan(config, rows=planning.Rows(10, 0), evaluation_rows=held_out, device=device)


def test_the_plan_says_what_will_happen(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperion.planning import effective_max_length
    from hyperion.training_checks import length_problems

    plain = planned(tiny_model, monkeypatch, eval_strategy="no")
    assert (plain.plan.device, plain.plan.steps) == ("cpu", 6)
    assert "at most 512 tokens a row" in plain.plan.settings["batch"]
    again = FinetuneConfig.parse(plain.plan.config)
    assert effective_max_length(again, plain.facts) == 512
    assert not length_problems(again.training, plain.facts)
    assert plain.plan.settings["evaluation"] == "no"
    assert not {"kept", "autocast"} & plain.plan.settings.keys()
    judged = planned(tiny_model, monkeypatch, held_out=3, bf16=True, use_cpu=True, dataloader_drop_last=True,
                     per_device_eval_batch_size=2)  # fmt: skip
    assert (judged.plan.settings["evaluation"], judged.plan.settings["kept"]) == ("epoch", "the best by eval_loss")
    assert judged.plan.settings["autocast"] == "bfloat16"
    assert judged.plan.steps == 3
    assert "kept" not in planned(tiny_model, monkeypatch, held_out=3, eval_strategy="no").plan.settings


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_either_name_of_checkpointing_counts_in_the_forecast(name, tiny_model: Path, monkeypatch) -> None:
    without = planned(tiny_model, monkeypatch).plan.memory
    assert planned(tiny_model, monkeypatch, **{name: True}).plan.memory["activations"] < without["activations"]


def test_a_refused_key_is_explained_once() -> None:
    assert refused(training={"deepspeed": "x"}).count("deepspeed") == 2  # its path, and its name


def test_a_config_object_of_another_plugin_is_refused() -> None:
    class Stranger(AdapterConfig):
        type: str = "lora"

    assert 'no config of the adapter "lora"' in refused(adapter=Stranger())


def test_training_maps_the_specifications_names_to_what_transformers_has() -> None:
    training = FinetuneConfig(
        base_model="owner/model",
        adapter="lora",
        training={"warmup_ratio": 0.03, "lr_scheduler": "linear", "adam_beta2": 0.95, "eval_steps": 50},
    ).training
    arguments = training.arguments(evaluates=True)
    assert arguments["warmup_steps"] == 0.03
    assert arguments["adam_beta2"] == 0.95
    assert (arguments["eval_strategy"], arguments["save_strategy"], arguments["save_steps"]) == ("steps", "steps", 50)
    assert arguments["load_best_model_at_end"] is True
    assert "lr_scheduler" not in arguments
    without = training.arguments(evaluates=False)
    assert (without["eval_strategy"], without["load_best_model_at_end"]) == ("no", False)
    assert "eval_steps" not in without


def test_arguments_are_all_taken_by_the_installed_transformers(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    training = FinetuneConfig(base_model="owner/model", adapter="lora", training={"max_grad_norm": 0.5}).training
    made = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **training.arguments(evaluates=True))
    assert made.max_grad_norm == 0.5
    assert made.learning_rate == training.learning_rate


def test_a_scheduler_is_chosen_by_name_or_mapping_or_transformers_names() -> None:
    def scheduler(**training):
        return FinetuneConfig(base_model="owner/model", adapter="lora", training=training).scheduler()

    by_mapping = scheduler(lr_scheduler={"type": "cosine_with_restarts", "num_cycles": 2})
    by_old_names = scheduler(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2})
    assert by_mapping == by_old_names
    assert by_mapping.num_cycles == 2
    assert scheduler(lr_scheduler="linear").type == "linear"


def test_relative_paths_start_from_the_files_folder(tmp_path: Path) -> None:
    path = write(tmp_path, '{"base_model": "owner/model", "adapter": {"type": "lora"}}', "config.json")
    config = FinetuneConfig.from_file(path)
    assert config.base_dir == tmp_path
    assert config.replace(training={"seed": 1}).base_dir == tmp_path


def test_the_schema_offers_every_installed_plugins_options() -> None:
    schema = config_schema()
    lora = schema["$defs"]["adapter:lora"]["properties"]
    assert lora["type"] == {"const": "lora"}
    assert {"r", "lora_alpha", "use_dora", "use_rslora"} <= lora.keys()
    assert "neftune_noise_alpha" in schema["$defs"]["TrainingConfig"]["properties"]
    assert schema["additionalProperties"] is False


def test_the_schema_and_the_model_agree_about_a_file(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    good = {
        "base_model": "a/b",
        "adapter": {"type": "lora", "r": 4},
        "dataset": "x.jsonl",
        "training": {"lr_scheduler": "cosine"},
    }
    jsonschema.validate(good, config_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**good, "adapter": {"type": "lora", "rr": 4}}, config_schema())
