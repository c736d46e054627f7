"""LoRA on a quantized base, from YAML to the reloaded artifact, with the quantizer that `plugins new` writes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperion import FinetuneConfig, Trainer
from hyperion.data import DatasetProcessor
from hyperion.data.encoding import Encoder
from hyperion.models import load_tuned
from hyperion.planning import make_plan

ROWS = [{"prompt": f"{n} plus {n} is", "completion": f" {n + n}"} for n in range(24)]


def settings(base: Path, method: str, **training: Any) -> dict[str, Any]:
    return {
        "base_model": str(base),
        "dtype": "float32",
        "adapter": {"type": "lora", "r": 4, "target_modules": "all-linear"},
        "quantization": {"method": method, "bits": 4, "group_size": 16},
        "training": {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, **training},
    }


@pytest.mark.slow
def test_it_trains_resumes_and_reloads_from_the_command_line(
    rtn: None, cli: Any, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    config = settings(tiny_model, "rtn", max_steps=4, save_steps=2, eval_steps=4, save_total_limit=5)
    config["dataset"] = {"dataset": "rows.jsonl", "validation_split": 8}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    trained = cli("train", "config.json", "--output_dir", "out")
    assert trained.code == 0, trained.stderr
    assert "lora on rtn" in trained.stdout + trained.stderr
    whole = (tmp_path / "out/adapter_model.safetensors").read_bytes()

    shutil.rmtree(tmp_path / "out/checkpoint-4")
    (tmp_path / "out/hyperion.json").unlink()
    resumed = cli("train", "config.json", "--output_dir", "out", "--resume")
    assert resumed.code == 0, resumed.stderr
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == whole
    assert "PackedLinear" in {type(module).__name__ for module in load_tuned(tmp_path / "out").model.modules()}


@pytest.mark.parametrize("method", ["bnb", "gptq", "torchao", "rtn"])
def test_the_plan_says_which_pairs_nobody_has_run(rtn: None, method: str, tiny_model: Path) -> None:
    config = settings(tiny_model, method, max_steps=1)
    if method != "rtn":
        del config["quantization"]["group_size"]
    checks = make_plan(FinetuneConfig(**config), device="cpu").plan.checks
    untested = [check.what for check in checks if check.state == "untested"]
    assert untested == (["lora on rtn"] if method == "rtn" else [])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_files_of_the_base_do_not_stay_in_memory_beside_the_quantized_weights(
    rtn: None, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")  # other tests of this process may hold that of all
    config = FinetuneConfig(**settings(base, "rtn", max_steps=1))
    Trainer(config).train(DatasetProcessor(dataset=ROWS).prepare()[0], output_dir=tmp_path / "out")
    tuned = load_tuned(tmp_path / "out")
    assert str(base) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert "PackedLinear" in {type(module).__name__ for module in tuned.model.modules()}


def test_bits_that_the_quantizer_cannot_do_are_refused_before_anything_is_loaded(
    rtn: None, tiny_model: Path, tmp_path: Path
) -> None:
    from hyperion import HyperionError

    config = settings(tiny_model, "rtn", max_steps=1)
    config["quantization"] = {"method": "rtn", "bits": 5, "group_size": 13}
    with pytest.raises(HyperionError) as caught:
        Trainer(FinetuneConfig(**config)).train(
            DatasetProcessor(dataset=ROWS).prepare()[0], output_dir=tmp_path / "out"
        )
    message = str(caught.value)
    assert "quantization.bits: rtn cannot hold weights in 5 bits" in message and "one of 2, 3, 4, 8" in message
    assert "quantization.group_size" in message and not (tmp_path / "out").exists()


def test_reloaded_it_has_the_loss_that_the_run_reported_however_it_was_quantized(
    rtn: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While loading, or offline: that is kept, and a second run does not quantize again."""
    monkeypatch.setenv("HYPERION_CACHE", str(tmp_path / "cache"))
    train, evaluation = DatasetProcessor(dataset=ROWS, validation_split=8).prepare()
    measured = {}
    for name, method, bits in (("a", "rtn", 4), ("b", "offline", 4), ("c", "offline", 4), ("d", "offline", 2)):
        config = settings(tiny_model, method, max_steps=8, eval_samples=0)
        config["quantization"]["bits"] = bits
        artifact = Trainer(FinetuneConfig(**config)).train(train, evaluation, output_dir=tmp_path / name)
        measured[name] = artifact.metrics["eval_loss"]
        tuned = load_tuned(tmp_path / name, dtype="float32")
        assert loss(tuned, evaluation) == pytest.approx(measured[name], rel=1e-4)
    assert measured["a"] == measured["b"] == measured["c"] != measured["d"]
    assert (tmp_path / "cache/times").read_text() == "once once ", "once for 4 bits, and once for 2"
    assert len(list((tmp_path / "cache/quantized").glob("offline-*"))) == 2, "nothing half-made is left"


def loss(tuned: Any, rows: Any) -> float:
    """Mean cross-entropy over the completions, one row at a time."""
    bos, total, count = Encoder(tuned.tokenizer).bos_id, 0.0, 0
    for row in rows:
        texts = (segment["text"] for segment in row["segments"])
        prompt, answer = (tuned.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        prompt, answer = [*([] if bos is None else [bos]), *prompt], [*answer, tuned.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = tuned.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count
