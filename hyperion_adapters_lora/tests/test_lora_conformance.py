"""LoRA keeps the contract, in the forms that change its tensors."""

from __future__ import annotations

from pathlib import Path

from hyperion_core.config import AdapterConfig
from hyperion_core.context import RunContext
from hyperion_core.specs import AdapterSpecs
from hyperion_core.testing import AdapterConformance
from hyperion_core.testing.bits import equal
from safetensors.torch import load_file


class TestLora(AdapterConformance):
    plugin = "lora"


class TestDora(AdapterConformance):
    plugin = "lora"
    options = {"use_dora": True, "target_modules": "all-linear", "r": 4}  # noqa: RUF012 - as the suite declares it


class TestWithAWholeModule(AdapterConformance):
    plugin = "lora"
    options = {"modules_to_save": ["lm_head"], "use_rslora": True}  # noqa: RUF012


class TestLoraPlus(AdapterConformance):
    plugin = "lora"
    options = {"loraplus_lr_ratio": 4.0, "use_rslora": True, "init_lora_weights": "gaussian"}  # noqa: RUF012


class TestPissa(AdapterConformance):
    """What stands in the file is made of what is trained and of its frozen start."""

    plugin = "lora"
    options = {"init_lora_weights": "pissa", "target_modules": "all-linear", "r": 4}  # noqa: RUF012
    random_start = False

    def test_the_file_holds_exactly_the_declared_tensors(
        self, hooks: AdapterSpecs, config: AdapterConfig, ctx: RunContext, tmp_path: Path
    ) -> None:
        model = self.trained(hooks, config, ctx)
        declared = self.declared(hooks, model, config)
        for for_resume in (False, True):
            folder = tmp_path / str(for_resume)
            folder.mkdir()
            paths = hooks.adapter_save(model=model, name="default", config=config, folder=folder, for_resume=for_resume)
            assert sorted(folder.iterdir()) == sorted(map(Path, paths))
            saved = load_file(folder / "adapter_model.safetensors")
            assert len(saved) == len(declared)
        for name, tensor in declared.items():
            rows = saved[name.replace(".default.parametrizations.weight.original", ".weight")]
            assert equal(rows.narrow(int(".lora_B." in name), 0, 4), tensor)


class TestOlora(TestPissa):
    options = {"init_lora_weights": "olora", "r": 4}  # noqa: RUF012
