"""What `convergence.py` compares: the usual LoRA, and settings that the literature says learn in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: What most recipes write: plain LoRA on two projections, the default schedule. Its learning rate is tuned.
BASELINE: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
BASELINE_RATES = (1e-3, 2e-3, 4e-3)

_ALL: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
_MLP: Mapping[str, Any] = {**_ALL, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
_QV: Mapping[str, Any] = BASELINE


@dataclass(frozen=True)
class Candidate:
    """Options of LoRA and keys of `training:`, the learning rate among them."""

    adapter: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What is told apart by: all that it sets, short."""
        options = dict(self.adapter)
        targets = options.pop("target_modules")
        rank, alpha = options.pop("r"), options.pop("lora_alpha")
        parts = [targets if isinstance(targets, str) else "+".join(t.removesuffix("_proj") for t in targets)]
        parts += [f"r {rank}, alpha {alpha:g}", *(f"{_SHORT.get(key, key)} {_shown(v)}" for key, v in options.items())]
        parts += [f"{_SHORT.get(key, key)} {_shown(value)}" for key, value in self.training.items()]
        return ", ".join(parts)

    def changed(self, **changes: Any) -> Candidate:
        """With other keys of `training:` or, where they are LoRA's, other options."""
        ours = {key: value for key, value in changes.items() if key in _LORAS}
        rest = {key: value for key, value in changes.items() if key not in _LORAS}
        return Candidate({**self.adapter, **ours}, {**self.training, **rest})


_SHORT = {"learning_rate": "lr", "init_lora_weights": "init", "loraplus_lr_ratio": "LoRA+", "use_rslora": "rsLoRA",
          "warmup_ratio": "warmup", "adam_beta2": "beta2", "optim": "by"}  # fmt: skip
_LORAS = frozenset({"r", "lora_alpha", "target_modules", "init_lora_weights", "loraplus_lr_ratio", "use_rslora"})


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _at(adapter: Mapping[str, Any], *rates: float, **training: Any) -> list[Candidate]:
    return [Candidate(dict(adapter), {"learning_rate": rate, **training}) for rate in rates]


#: In the order in which they are tried: what the time does not reach is left out. With more modules the best rate of
#: AdamW is lower than the baseline's, and without warmup the loss rises at first.
CANDIDATES: tuple[Candidate, ...] = (
    *_at(_ALL, 3e-3, optim="muon", warmup_ratio=0.1),
    *_at({**_ALL, "loraplus_lr_ratio": 4.0}, 3e-4, warmup_ratio=0.1),
    *_at(_ALL, 6e-4, warmup_ratio=0.1),
    *_at({**_ALL, "init_lora_weights": "pissa"}, 1e-4, warmup_ratio=0.1),
    *_at(_QV, 4e-3, optim="muon", warmup_ratio=0.1),
    *_at({**_QV, "loraplus_lr_ratio": 4.0}, 1e-3, warmup_ratio=0.1),
    *_at({**_ALL, "r": 64, "use_rslora": True}, 2e-4, warmup_ratio=0.1),
    *_at({**_ALL, "init_lora_weights": "pissa"}, 1e-3, optim="muon", warmup_ratio=0.1),
    *_at({**_ALL, "init_lora_weights": "lora_ga"}, 2e-4, warmup_ratio=0.1),
    *_at({**_ALL, "init_lora_weights": "eva", "loraplus_lr_ratio": 4.0}, 3e-4, warmup_ratio=0.1),
    *_at({**_ALL, "loraplus_lr_ratio": 16.0}, 1e-4, warmup_ratio=0.1),
    *_at({**_MLP, "loraplus_lr_ratio": 4.0}, 5e-4, warmup_ratio=0.1),
    *_at({**_ALL, "init_lora_weights": "olora"}, 2e-4, warmup_ratio=0.1),
)


def neighbours(best: Candidate) -> Iterator[Candidate]:
    """Settings beside the best one, each with one thing changed."""
    rate = best.training["learning_rate"]
    yield best.changed(learning_rate=float(f"{rate * 1.6:.1g}"))
    yield best.changed(adam_beta2=0.95)
    yield best.changed(learning_rate=float(f"{rate / 1.6:.1g}"))
    yield best.changed(warmup_ratio=0.2)
    if "optim" not in best.training:
        yield best.changed(optim="muon")
    if best.adapter.get("init_lora_weights") != "lora_ga":
        yield best.changed(init_lora_weights="lora_ga")
    ratio = best.adapter.get("loraplus_lr_ratio")
    yield best.changed(loraplus_lr_ratio=ratio * 2 if ratio else 4.0)
    yield best.changed(r=2 * best.adapter["r"], lora_alpha=2 * best.adapter["lora_alpha"])
