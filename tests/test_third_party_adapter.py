"""An adapter that is none of ours, in a distribution written on the fly, trains from YAML."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

SOURCE = '''
"""A learnt offset on the output of every down projection: no PEFT, nothing of Hyperion's framework."""

from pathlib import Path

from hyperion_core.config import AdapterConfig
from hyperion_core.errors import CompatibilityError
from hyperion_core.facts import Cost, ParamGroup
from hyperion_core.kinds import Adapter


class OffsetConfig(AdapterConfig):
    type: str = "offset"
    start: float = 0.0


class OffsetAdapter(Adapter):
    config_class = OffsetConfig

    def adapter_targets(self, config, model):
        found = [module.name for module in model.matching(["down_proj"])]
        if not found:
            raise CompatibilityError("there is no down_proj in " + model.source)
        return found

    def adapter_estimate(self, config, model):
        return Cost({"adapter": 4 * sum(module.shape[0] for module in model.matching(["down_proj"]))})

    def adapter_apply(self, model, name, config, ctx):
        import torch

        model.requires_grad_(False)
        for module_name, module in list(model.named_modules()):
            if module_name.endswith("down_proj"):
                offset = torch.full((module.out_features,), config.start, device=ctx.device, requires_grad=True)
                module.register_parameter("offset_" + name, torch.nn.Parameter(offset.detach().clone()))
                module.register_forward_hook(
                    lambda module, args, out, key="offset_" + name: out + getattr(module, key).to(out.dtype)
                )
        return model

    def _tensors(self, model, name):
        return {key: value for key, value in model.named_parameters() if key.endswith("offset_" + name)}

    def adapter_param_groups(self, model, name, config):
        return [ParamGroup("offsets", tuple(self._tensors(model, name).items()), lr_ratio=2.0)]

    def adapter_activate(self, model, weights):
        raise NotImplementedError("this one is always on")

    def adapter_save(self, model, name, config, folder, for_resume):
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder, "offsets.safetensors")
        save_file({key: value.detach().contiguous() for key, value in self._tensors(model, name).items()}, path)
        return [path]

    def adapter_load(self, model, name, folder, trainable, ctx):
        import torch
        from safetensors.torch import load_file

        model = self.adapter_apply(model, name, OffsetConfig(), ctx)
        with torch.no_grad():
            for key, value in load_file(Path(folder, "offsets.safetensors")).items():
                model.get_parameter(key).copy_(value)
        return model

    def adapter_unload(self, model, name):
        for module in model.modules():
            if hasattr(module, "offset_" + name):
                delattr(module, "offset_" + name)
                module._forward_hooks.clear()
        return model
'''


def test_it_trains_from_yaml_and_loads_again(fake_dist, cli, tiny_model: Path, tmp_path: Path) -> None:
    fake_dist("acme-offset", {"hyperion.adapters": {"offset": "acme_offset:OffsetAdapter"}}, {"acme_offset": SOURCE})
    rows = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(
        f"""
        base_model: {tiny_model}
        dtype: float32
        adapter: {{type: offset, start: 0.0}}
        dataset: {{dataset: rows.jsonl, validation_split: 2}}
        training: {{num_train_epochs: 4, per_device_train_batch_size: 5, learning_rate: 0.05, logging_steps: 1,
                    warmup_ratio: 0.0, lr_scheduler: constant, eval_samples: 0}}
        """,
        encoding="utf-8",
    )
    validated = cli("validate", "config.yaml")
    assert validated.code == 0, validated.stderr
    assert "offset  (acme-offset 1.0" in validated.stdout

    trained = cli("train", "config.yaml", "--output_dir", "out")
    assert trained.code == 0, trained.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    adapter = json.loads((tmp_path / "out/adapter.json").read_text())
    assert (adapter["type"], adapter["distribution"]) == ("offset", "acme-offset")
    assert not (tmp_path / "out/adapter_config.json").exists()

    from safetensors.torch import load_file

    from hyperion.models import load_tuned

    tuned = load_tuned(tmp_path / "out", dtype="float32")
    saved = load_file(tmp_path / "out/offsets.safetensors")
    assert saved, "nothing was saved"
    assert all((tuned.model.get_parameter(key) == value).all() for key, value in saved.items())
    assert any(value.abs().max() > 0 for value in saved.values()), "nothing was learnt"


PREPARED = """
from hyperion_adapters_lora import LoraAdapter, LoraConfig


class DataLoraConfig(LoraConfig):
    type: str = "data-lora"


class DataLora(LoraAdapter):
    config_class = DataLoraConfig

    def adapter_prepare(self, config, model, batches):
        losses = [float(model(**batch).loss) for batch in batches]
        return config.model_copy(update={"r": len(losses)})
"""


def test_an_adapter_that_initialises_from_data_changes_its_config_and_is_resumed_with_it(
    fake_dist, cli, tiny_model: Path, tmp_path: Path
) -> None:
    fake_dist("data-lora", {"hyperion.adapters": {"data-lora": "data_lora:DataLora"}}, {"data_lora": PREPARED})
    rows = [{"prompt": f"{n} is", "completion": f" {n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "base_model": str(tiny_model),
                "adapter": {"type": "data-lora", "r": 8, "target_modules": ["q_proj"]},
                "dataset": "rows.jsonl",
                "training": {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "save_total_limit": 5},
            }
        ),
        encoding="utf-8",
    )
    trained = cli("train", "config.json", "--output_dir", "out")
    assert trained.code == 0, trained.stderr
    assert json.loads((tmp_path / "out/adapter.json").read_text())["config"]["r"] == 3, "three batches of four rows"

    shutil.rmtree(tmp_path / "out/checkpoint-4")
    (tmp_path / "out/hyperion.json").unlink()
    whole = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    resumed = cli("train", "config.json", "--output_dir", "out", "--resume")
    assert resumed.code == 0, resumed.stderr
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == whole
    assert json.loads((tmp_path / "out/adapter.json").read_text())["config"]["r"] == 3
