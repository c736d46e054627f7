"""What `nox -s wheels` runs on the installed wheels: a tiny training by the command line, and its artifact reloaded.

Copied out of the checkout before it runs, so that nothing of it can be imported by chance.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hyperion_core.testing.tiny import save_tiny_base

CONFIG = """\
base_model: base
dtype: float32
adapter: {type: lora, r: 4, target_modules: all-linear}
dataset: {dataset: rows.jsonl, validation_split: 4}
training: {num_train_epochs: 2, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 1, use_cpu: true}
"""


def hyperion(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "hyperion", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"hyperion {' '.join(arguments)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def main(folder: Path) -> None:
    save_tiny_base(folder / "base")
    rows = [{"prompt": f"{n} plus {n} is", "completion": f" {n + n}"} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    assert "hyperion-adapters-lora" in hyperion("validate", str(folder / "config.yaml"))
    hyperion("train", str(folder / "config.yaml"), "--output_dir", str(folder / "out"))

    import torch

    from hyperion import Artifact
    from hyperion.models import load_tuned

    artifact = Artifact.read(folder / "out")
    assert artifact.changed_files() == []
    tuned = load_tuned(folder / "out", dtype="float32")
    ids = tuned.tokenizer("7 plus 7 is", return_tensors="pt").input_ids
    with torch.no_grad():
        with_adapter = tuned.model(ids).logits
        tuned.use_adapter(False)
        without = tuned.model(ids).logits
    assert not torch.equal(with_adapter, without), "the adapter that was reloaded does nothing"

    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0].startswith("hyperion")}
    inside = Path(sys.prefix).resolve()
    strangers = [file for each in ours.values() if (file := getattr(each, "__file__", None))
                 and inside not in Path(file).resolve().parents]  # fmt: skip
    assert not strangers, f"imported from elsewhere: {strangers}"
    print(f"trained and reloaded: eval_loss {artifact.metrics['eval_loss']:.4f}, {len(ours)} modules of ours")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
