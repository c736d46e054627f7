"""A merged model is the tuned one: the same logits from plain transformers, whatever the adapter and the base are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuned_runs import LORA, ROWS, RTN, base_model, tuned_run

from hyperion.exporting import export_merged
from hyperion.models import load_tuned

BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
PLAIN = {"quantization": None}
CASES = [
    pytest.param({}, {}, id="lora"),
    pytest.param({"seed": 1, **PLAIN}, {}, id="lora, plain base"),
    pytest.param({"adapter": {**LORA, "use_dora": True}}, {}, id="dora"),
    pytest.param({"adapter": {**LORA, "use_rslora": True, "lora_alpha": 12}, "seed": 2}, {}, id="rslora"),
    pytest.param({"adapter": {**LORA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}}, {}, id="ranks"),
    pytest.param({"adapter": {**LORA, "bias": "lora_only"}}, BIASES, id="biases"),
    pytest.param({"adapter": {**LORA, "lora_bias": True}, "seed": 3}, BIASES, id="bias of B"),
    pytest.param({"adapter": {**LORA, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}}, {}, id="whole modules"),
    pytest.param({"adapter": {**LORA, "modules_to_save": ["layers.1.mlp"]}, **PLAIN}, {}, id="a whole block"),
    pytest.param({"adapter": {"type": "lora", "target_modules": ["q_proj", "lm_head"]}}, {}, id="head"),
    pytest.param({"adapter": {"type": "ia3"}}, BIASES, id="ia3"),
    pytest.param({"new_tokens": ["<ask>", "<tell>"]}, {}, id="new tokens"),
    pytest.param({"new_tokens": ["<ask>", "<tell>"], "seed": 4}, TIED, id="new tokens, tied"),
    pytest.param({}, TIED, id="tied"),
    pytest.param({"adapter": {"type": "lora", "target_modules": ["q_proj", "embed_tokens"]}}, TIED, id="one end, tied"),
]


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = [tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"] for row in ROWS[:6]]
    with torch.no_grad():
        return torch.cat([model(input_ids=each).logits[0] for each in ids])


@pytest.mark.no_cover
@pytest.mark.parametrize("changes, overrides", CASES)
def test_merged_it_gives_the_logits_of_the_tuned_model(
    rtn: None, changes: dict, overrides: dict, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = base_model(tmp_path / "base", **overrides)
    run = tuned_run(tmp_path / "run", base, **{"quantization": RTN, **changes})
    tuned = load_tuned(run.folder, dtype="float32")
    expected = logits(*tuned)
    tuned.use_adapter(False)
    effect = (logits(*tuned) - expected).abs().max()
    done = export_merged(run.folder, tmp_path / "merged", into="float32")
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype="auto")
    assert model.dtype == torch.float32 and type(model).__module__.startswith("transformers.")
    far = (logits(model, AutoTokenizer.from_pretrained(done.folder)) - expected).abs().max()
    assert far <= 1e-5 * expected.abs().max() and far < effect / 1000
    config = json.loads((done.folder / "config.json").read_text())
    assert "quantization_config" not in config
    stays_tied = bool(overrides.get("tie_word_embeddings")) and "one end" not in request.node.name
    assert config["tie_word_embeddings"] == stays_tied
    assert stays_tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def test_weights_that_are_held_transposed_are_merged_too(tmp_path: Path) -> None:
    """GPT-2's layers hold them as (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    base = base_model(tmp_path / "base")
    for path in base.glob("*.safetensors"):
        path.unlink()
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=512, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(base)
    run = tuned_run(tmp_path / "run", base, adapter={"type": "lora", "target_modules": ["c_attn", "c_fc"]})
    tuned = load_tuned(run.folder, dtype="float32")
    expected = logits(*tuned)
    done = export_merged(run.folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(done.folder)
    assert (logits(merged, tuned.tokenizer) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert done.parity.effect and done.parity.effect > 1e-3


@pytest.mark.slow
def test_from_the_command_line(rtn: None, cli: Any, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    tuned_run(tmp_path / "run", base, quantization=RTN)
    base.rename(tmp_path / "moved")
    (tmp_path / "prompts.txt").write_text("<ask> 3 plus 4?\n<ask> 5 plus 6?\n")
    arguments = ("merge", "run", "--base-model", "moved", "--prompts", "prompts.txt")
    refused = cli(*arguments, "--output-dir", "out", "--max-kl", "0")
    assert refused.code == 2 and "does not answer as the model that it was made of" in refused.stderr
    assert "--max-kl" in refused.stderr and not (tmp_path / "out").exists()
    done = cli(*arguments, "--output-dir", "out", "--into", "bfloat16")
    assert done.code == 0, done.stderr
    assert "merged into out (bfloat16)" in done.stdout and "token ids equal" in done.stdout
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["figures"]["texts"] == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    again = cli(*arguments, "--output-dir", "out")
    assert again.code == 2 and "not empty" in again.stderr
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name]
