"""Bits shared out by measured sensitivity against the same bits everywhere, on the real SmolLM2-135M.

    python benchmarks/adaptive_bits.py                     everything; begun again, it goes on where it was
    python benchmarks/adaptive_bits.py --only "torchao/"   the arms whose names have that in them
    python benchmarks/adaptive_bits.py --list

Its weights lie on a 4-bit grid of groups of 32, so everything is rounded in symmetric groups of 64, which that grid
gives no advantage. Text: chats made of 999 real instructions, disjoint rows for calibration, training and evaluation,
which is on the answers. "The same bits everywhere" at half a bit is every other layer with one bit more: as many bytes.

Each arm is measured once and kept in benchmarks/results/adaptive-bits.json; a table and a plot are written beside it
after each. An arm that fails is told, and tried again the next time. The command may run twice at once: an arm that is
being measured is left to the process that does.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import processor, versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
METHODS = ("torchao", "gptq")
TARGETS = (3.0, 2.5, 3.5, 4.0)
TRAINED_TARGETS = (2.5, 3.0)
SEEDS = (0, 1, 2)
STEPS = 100
_ROWS_A_STEP = 3  # about 170 tokens each
_TUNED_HELD_OUT = 64  # chats
_SAMPLE_OF_EACH_KIND = 3
_TRUTH_ROWS = 16  # of the held-out ones, about 1,900 tokens of answers
_LIBRARIES = ("torch", "transformers", "peft", "gptqmodel", "torchao", "bitsandbytes", "scipy")

Arms = dict[str, Callable[[Any], dict[str, Any]]]


def arms() -> Arms:
    """By name, in the order in which they are measured."""
    found: Arms = {"unquantized": lambda bench: {**bench.quality(bench.plain()), "tokens": bench.answers}}
    found |= _every_target(SEEDS[:1])
    for bits in (4, 3):
        found[f"nearest/gptq/{bits}"] = _nearest(bits)
    bases = {
        "bf16": None,
        "nf4": {"method": "bnb", "bits": 4},
        "nf4-32": {"method": "bnb", "bits": 4, "group_size": 32},
    }
    for name, quantization in bases.items():
        found[f"lora/{name}"] = _trained_plain(name, quantization, "bfloat16")
    for method in METHODS:
        found[f"ranks/{method}"] = _ranks(method)
    for method in METHODS:
        for target in TRAINED_TARGETS:
            for kind in ("uniform", "adaptive"):
                found[f"lora/{method}/{target:g}/{kind}"] = _trained(method, target, kind)
    return found | _every_target(SEEDS[1:])


def _every_target(seeds: Sequence[int]) -> Arms:
    found: Arms = {}
    for seed, method, target in itertools.product(seeds, METHODS, TARGETS):
        if method == "gptq" or seed == SEEDS[0]:  # rounding to nearest measures on nothing
            found[f"{method}/{target:g}/uniform/{seed}"] = _post_training(method, target, "uniform", seed)
        found[f"{method}/{target:g}/adaptive/{seed}"] = _post_training(method, target, "adaptive", seed)
    return found


def _plan(bench: Any, method: str, target: float, kind: str, seed: int) -> Any:
    return bench.uniform_plan(target) if kind == "uniform" else bench.adaptive_plan(method, target, seed)


def _post_training(method: str, target: float, kind: str, seed: int) -> Callable[[Any], dict[str, Any]]:
    def measure(bench: Any) -> dict[str, Any]:
        plan = _plan(bench, method, target, kind, seed)
        model, held = bench.quantized(method, plan, seed)
        widths = [plan.of(module.name)[0] for module in bench.facts.linear()]
        return {
            **bench.quality(model),
            "linear_bytes": bench.linear_bytes(method, plan),
            **held,
            "modules_by_bits": {str(bits): widths.count(bits) for bits in sorted(set(widths))},
        }

    return measure


def _nearest(bits: int) -> Callable[[Any], dict[str, Any]]:
    return lambda bench: bench.quality(bench.rounded("gptq", bits))


def _ranks(method: str) -> Callable[[Any], dict[str, Any]]:
    return lambda bench: _ranks_of(bench, method)


def _ranks_of(bench: Any, method: str) -> dict[str, Any]:
    """How well each measure of sensitivity ranks modules and bits, on a sample of modules quantized alone."""
    from adaptive_bits_measures import estimates, rounded_alone, true_changes
    from scipy.stats import spearmanr

    from hyperion.quantization.sensitivity import measure_sensitivity

    kinds: dict[str, list[str]] = {}
    for module in bench.facts.linear():
        kinds.setdefault(module.name.rpartition(".")[2], []).append(module.name)
    draw = random.Random(0)
    names = [name for each in kinds.values() for name in draw.sample(each, _SAMPLE_OF_EACH_KIND)]
    widths = [2, 3, 4]
    hooks, plugin = bench.hooks(method)
    ours = measure_sensitivity(
        bench.plain(),
        hooks.quantizer(method),
        bench.config(method),
        dict.fromkeys(names, widths),
        64,
        bench.calibration_rows(0),
        looks_at_data=plugin.provides.calibration,
    )
    rounded = rounded_alone(bench, names, widths, method)
    measured = {"ours": ours.loss_increase, **estimates(bench, names, widths, rounded)}
    truth = true_changes(bench, rounded, _TRUTH_ROWS)
    ranks = {}
    for kind, of in measured.items():
        for against, true in truth.items():
            for chosen in ([2, 3, 4], [2], [3], [4]):
                pairs = [(of[name][bits], true[name][bits]) for name in names for bits in chosen]
                key = f"{kind} | {against} | {','.join(map(str, chosen))}"
                ranks[key] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    plain = {kind: {name: {str(b): of[name][b] for b in widths} for name in names} for kind, of in measured.items()}
    return {"ranks": ranks, "modules": names, "estimates": plain,
            "truth": {kind: {n: {str(b): v for b, v in of.items()} for n, of in by.items()}
                      for kind, by in truth.items()}}  # fmt: skip


def _trained_plain(name: str, quantization: Mapping[str, Any] | None, dtype: str) -> Callable[[Any], dict[str, Any]]:
    return lambda bench: _train(bench, name, quantization, dtype)


def _trained(method: str, target: float, kind: str) -> Callable[[Any], dict[str, Any]]:
    def measure(bench: Any) -> dict[str, Any]:
        plan = _plan(bench, method, target, kind, SEEDS[0])
        name = f"{method}-{target:g}-{kind}"
        quantization = {"method": method, "sym": True, "bit_plan": str(bench.plan_file(method, plan, name))}
        if bench.hooks(method)[1].provides.calibration:
            quantization["calibration"] = bench.calibration(SEEDS[0]).model_dump()
        return {**_train(bench, name, quantization, bench.dtype), "linear_bytes": bench.linear_bytes(method, plan)}

    return measure


def _train(bench: Any, name: str, quantization: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """LoRA on all linear modules; its loss at the end of training, and on the answers of held-out chats."""
    import shutil

    from hyperion import FinetuneConfig, Trainer
    from hyperion.data import DatasetProcessor
    from hyperion.models import load_tuned
    from hyperion.monitoring.metrics import MetricsFile

    rows, held_out = bench.whole_chats("training"), bench.whole_chats("held-out")[:_TUNED_HELD_OUT]
    config: dict[str, Any] = {
        "base_model": str(bench.base),
        "dtype": dtype,
        "adapter": {"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "training": {
            "max_steps": STEPS, "per_device_train_batch_size": _ROWS_A_STEP, "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3, "lr_scheduler": "cosine", "warmup_ratio": 0.1, "max_length": bench.max_length,
            "logging_steps": 1, "eval_steps": STEPS, "save_steps": STEPS, "eval_samples": 0, "seed": SEEDS[0],
            "use_cpu": bench.device == "cpu",
        },
    }  # fmt: skip
    if quantization is not None:
        config["quantization"] = quantization
    folder = bench.folder / f"lora-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    train, _ = DatasetProcessor(dataset=rows).prepare()
    evaluation, _ = DatasetProcessor(dataset=held_out).prepare()
    artifact = Trainer(FinetuneConfig(**config)).train(train, evaluation, output_dir=folder)
    losses = [line["loss"] for line in MetricsFile(folder / "metrics.jsonl").read() if line.get("loss") is not None]
    tuned = load_tuned(folder, dtype=dtype)
    method = (quantization or {}).get("method")
    infos = tuned.hooks.quantizer(method).quantizer_modules(model=tuned.model) if method else {}
    shutil.rmtree(folder)
    return {
        "perplexity": math.exp(artifact.metrics["eval_loss"]),
        "eval_loss": artifact.metrics["eval_loss"],
        "training_loss": sum(losses[-10:]) / len(losses[-10:]),
        "losses": losses,
        "held_bytes": sum(info.nbytes for info in infos.values()),
        "bits_in_memory": sorted({info.bits for info in infos.values()}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], help="arms whose name holds this; may be given again")
    parser.add_argument("--list", action="store_true", help="name the arms")
    parser.add_argument("--fresh", action="store_true", help="forget the results of these arms")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; two processes with one each take less time")
    parser.add_argument("--folder", type=Path, help="for text and plans; default: beside Hyperion's other caches")
    parser.add_argument("--rows", type=int, default=64, help="of calibration")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--held-out", type=int, default=199, help="chats that perplexity is measured on")
    parser.add_argument("--results", type=Path, default=RESULTS / "adaptive-bits.json", help="the file of results")
    options = parser.parse_args()
    chosen = {name: arm for name, arm in arms().items() if all(part in name for part in options.only)}
    if options.list:
        print("\n".join(chosen))
        return
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(options.threads))
    import torch
    from adaptive_bits_measures import Bench, cache_dir, quiet_libraries
    from adaptive_bits_report import write_report
    from filelock import FileLock, Timeout

    torch.set_num_threads(options.threads)
    folder = options.folder or cache_dir() / "benchmark-adaptive-bits"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, options.rows, options.max_length, options.held_out)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    settings = {"rows": bench.rows, "max_length": bench.max_length, "held_out": bench.held_out, "dtype": bench.dtype}
    failed = []
    if options.fresh:
        _update(options.results, settings, forgotten=chosen)
    for name, arm in chosen.items():
        try:
            with FileLock(folder / f".{name.replace('/', '-')}.lock", timeout=0):
                if name in _update(options.results, settings):
                    continue
                print(f"{name} …", flush=True)
                started = time.monotonic()
                with quiet_libraries():
                    figures = arm(bench)
                figures["seconds"] = round(time.monotonic() - started)
                _update(options.results, settings, {name: figures})
        except Timeout:
            continue  # another process is at it
        except Exception as error:
            print(f"  FAILED: {type(error).__name__}: {error}", flush=True)
            failed.append(name)
            continue
        print(f"  perplexity {figures.get('perplexity', float('nan')):.2f}, {figures['seconds']} s", flush=True)
        write_report(options.results)
    results = _update(options.results, settings)
    print(f"{len(results)} arms measured; {options.results.with_suffix('.md')}")
    if failed:
        sys.exit("failed: " + ", ".join(failed))


def _update(
    file: Path, settings: Mapping[str, Any], more: Mapping[str, Any] | None = None, forgotten: Collection[str] = ()
) -> dict[str, Any]:
    """All results that the file holds, once `more` are added to it, and the `forgotten` ones are not."""
    from filelock import FileLock

    with FileLock(file.with_name(f".{file.name}.lock")):
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if found and found["settings"] != settings:
            sys.exit(f"{file} was measured with {found['settings']}: give --results another name")
        arms_found = {name: of for name, of in found.get("arms", {}).items() if name not in forgotten}
        arms_found |= more or {}
        if arms_found != found.get("arms", {}):
            content = {
                "command": "python benchmarks/adaptive_bits.py",
                "date": datetime.date.today().isoformat(),
                "machine": processor(),
                "versions": versions(_LIBRARIES),
                "settings": settings,
                "of": len(arms()),
                "arms": {name: arms_found[name] for name in arms() if name in arms_found},
            }
            beside = file.with_name(f".{file.name}.partial")
            beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            beside.replace(file)
        return arms_found


if __name__ == "__main__":
    main()
