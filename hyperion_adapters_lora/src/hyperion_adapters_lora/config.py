"""The options of LoRA: PEFT's own names, checked without importing PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from hyperion_core.config import AdapterConfig
from hyperion_core.errors import Problem
from hyperion_core.foreign import with_foreign_fields
from pydantic import Field, PositiveFloat, PositiveInt

from hyperion_peft import pattern_problems

# Fields of peft's LoraConfig that are left out, and why.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("megatron_config", "megatron_core"), "it belongs to Megatron's parallel layers"),
    **dict.fromkeys(
        ("eva_config", "lora_ga_config"), "the published settings are used, and ranks stay as configured; see init_rows"
    ),
    "corda_config": "no test here covers CorDA; eva and lora_ga start from data too",
    **dict.fromkeys(
        ("loftq_config", "kasa_config", "layer_replication"), "it changes the base, which must stay as it is"
    ),
    "runtime_config": "it is no part of an adapter",
    "target_parameters": "it wraps parameters that are no module, which merging and routing cannot address",
    "alora_invocation_tokens": "it acts from some tokens on only, and cannot be merged",
    **dict.fromkeys(("velora_config", "monteclora_config", "arrow_config", "use_bdlora"), "no test here covers it"),
    **dict.fromkeys(("use_qalora", "qalora_group_size"), "it works on GPTQ bases only, and no test here covers it"),
    "ensure_weight_tying": "new_tokens keeps tied weights tied; whole tied embeddings cannot be trained",
    "fan_in_fan_out": "it follows from the kind of each module, and is set accordingly",
    "trainable_token_indices": "which rows are trained is decided by new_tokens",
}
_NOT_FIELDS = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
_PLAIN = (True, False, "gaussian", "orthogonal")
_NOT_HERE: Mapping[str, str] = {
    "loftq": "it replaces the base by its own quantized version, and the base must stay as it is",
    "corda": "no test here covers it; eva and lora_ga start from data too",
}
_PISSA = re.compile(r"pissa(_niter_(?P<passes>\d+))?")

#: What an initialisation of ours is computed from; PEFT makes the others.
Source = Literal["weights", "activations", "gradients"]
_SOURCES: Mapping[str, Source] = {"olora": "weights", "eva": "activations", "lora_ga": "gradients"}


@with_foreign_fields("peft", "tuners/lora/config.py", "LoraConfig", leave_out=(*REFUSED, *_NOT_FIELDS))
class LoraConfig(AdapterConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    With DoRA (arXiv:2402.09353), rsLoRA (arXiv:2312.03732), LoRA+ (arXiv:2402.12354), and the initialisations PiSSA
    (arXiv:2404.02948), OLoRA (arXiv:2406.01775), EVA (arXiv:2410.07170) and LoRA-GA (arXiv:2407.05000).

    A wrapped module computes Wx + (lora_alpha / r) BAx, where A is (r, in) and B is (out, r). Where a method starts
    from a product B₀A₀ that is not zero, it computes Wx + (lora_alpha / r) (BA - B₀A₀)x: W itself never changes.

    Example: `LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])`.
    """

    type: str = "lora"
    r: PositiveInt = Field(8, description="Rank of the update.")
    lora_alpha: PositiveInt | PositiveFloat = Field(8, description="The update is scaled by lora_alpha / r.")
    target_modules: str | list[str] | None = Field(
        None,
        description="Modules to wrap: names or last parts of names, a regular expression over whole names, or"
        ' "all-linear". Left out: what PEFT wraps on this architecture, or all linear modules where it knows none.',
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on what goes into A.")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Biases of the base to train: none, all, or those of the wrapped modules."
    )
    task_type: Literal["CAUSAL_LM"] = Field("CAUSAL_LM", description="Causal language models only.")
    exclude_modules: str | list[str] | None = Field(None, description="Modules to leave out, named as target_modules.")
    modules_to_save: list[str] | None = Field(None, description="Modules to train in full and save beside the adapter.")
    use_dora: bool = Field(
        False, description="Train the magnitude of each weight column apart from its direction (DoRA)."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) (rsLoRA).")
    init_lora_weights: bool | str = Field(
        True,
        description='Start: true (A random, B zero), false (both random), "gaussian", "orthogonal"; from the weights '
        '"pissa", "pissa_niter_N" (approximate, N passes) or "olora"; from the data "eva" or "lora_ga".',
    )
    init_rows: PositiveInt | None = Field(
        None,
        description='Rows of the training data, the first ones, that "eva" and "lora_ga" look at: 16 unless given.',
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, allow_inf_nan=False, description="LoRA+: how many times the learning rate of A that of B is."
    )
    layers_to_transform: int | list[int] | None = Field(None, description="Numbers of the layers to wrap, from 0.")
    layers_pattern: str | list[str] | None = Field(None, description='Name of the list of layers ("layers", "h").')
    rank_pattern: dict[str, PositiveInt] | None = Field(None, description="Ranks by module name or regular expression.")
    alpha_pattern: dict[str, PositiveInt | PositiveFloat] | None = Field(
        None, description="lora_alpha by module name or regular expression."
    )
    lora_bias: bool = Field(False, description="Give B a bias.")

    @property
    def init_source(self) -> Source | None:
        """What the initialisation is computed from; None where PEFT makes it."""
        init = self.init_lora_weights
        if not isinstance(init, str):
            return None
        return "weights" if _PISSA.fullmatch(init) else _SOURCES.get(init)

    @property
    def has_offset(self) -> bool:
        """Whether B₀A₀ is not zero at the start, and taken off again by a frozen copy of it."""
        return self.init_source in ("weights", "gradients")

    @property
    def passes(self) -> int | None:
        """N of "pissa_niter_N"; None where the decomposition is exact."""
        found = _PISSA.fullmatch(str(self.init_lora_weights))
        return int(found["passes"]) if found and found["passes"] else None

    @classmethod
    def contradictions(cls, data: Mapping[str, Any]) -> list[Problem]:
        problems = [
            Problem(key, f'"{key}" of PEFT cannot be used here', REFUSED[key], "leave it out")
            for key in data
            if key in REFUSED
        ]
        problems += _initialisation(data)
        problems += pattern_problems(data)
        targets, layers = data.get("target_modules"), data.get("layers_to_transform")
        if isinstance(targets, list) and not targets:
            problems.append(
                Problem(
                    "target_modules",
                    "target_modules is empty",
                    "nothing would be trained",
                    'name modules, or write "all-linear"',
                )
            )
        if isinstance(targets, str) and layers is not None:
            problems.append(
                Problem("layers_to_transform", "layers_to_transform needs target_modules as a list",
                        "a regular expression, or \"all-linear\", already says which layers are meant",
                        'write target_modules: ["q_proj", …], or choose the layers in the expression')
            )  # fmt: skip
        if data.get("layers_pattern") and layers is None:
            problems.append(
                Problem("layers_pattern", "layers_pattern alone means nothing",
                        "it says where layers_to_transform counts", "add layers_to_transform")
            )  # fmt: skip
        if data.get("lora_bias") and data.get("use_dora"):
            problems.append(Problem("lora_bias", "lora_bias does not go with use_dora", "PEFT refuses it", "drop one"))
        return problems


def _initialisation(data: Mapping[str, Any]) -> list[Problem]:
    init = data.get("init_lora_weights", True)
    at = "init_lora_weights"
    named = isinstance(init, str) and (init in _SOURCES or _PISSA.fullmatch(init) is not None)
    problems = []
    if data.get("init_rows") is not None and init not in ("eva", "lora_ga"):
        problems.append(
            Problem("init_rows", "init_rows alone means nothing", "this initialisation looks at no data",
                    'init_lora_weights: "eva" or "lora_ga", or leave init_rows out')
        )  # fmt: skip
    if init in _PLAIN or named:
        rank = data.get("r", 8)
        if init == "orthogonal" and isinstance(rank, int) and rank % 2:
            problems.append(Problem(at, '"orthogonal" needs an even r', f"r is {rank}", f"r: {rank + 1}"))
        elif isinstance(init, str) and data.get("lora_bias"):
            why = "PEFT refuses it" if init in _PLAIN else "no test here covers it"
            what = f'lora_bias does not go with init_lora_weights "{init}"'
            problems.append(Problem("lora_bias", what, why, "init_lora_weights: true"))
    elif isinstance(init, str):
        why = next((why for name, why in _NOT_HERE.items() if init.startswith(name)), "no test here covers it")
        fix = 'choose true, false, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva" or "lora_ga"'
        problems.append(Problem(at, f'the initialisation "{init}" cannot be used', why, fix))
    return problems
