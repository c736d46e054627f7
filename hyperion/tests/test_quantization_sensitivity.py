"""What bits are said to cost, held against what they do cost, on small models that have learnt something."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hyperion_core.errors import ModelError
from hyperion_core.hooks import RunHooks
from hyperion_core.specs import QuantizerSpecs
from hyperion_core.testing.tiny import tiny_llama
from scipy.stats import spearmanr

from hyperion.plugin_templates.quantizer.plugin import ChangemeConfig, ChangemeQuantizer
from hyperion.quantization.sensitivity import Sensitivity, measure_sensitivity

GROUP = 16
CONFIG = ChangemeConfig(symmetric=True)
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn"]


def quantizer() -> QuantizerSpecs:
    hooks = RunHooks()
    hooks.add(ChangemeQuantizer(), "changeme")
    return hooks.quantizer("changeme")


def rows(seed: int, count: int = 64, least: int = 40) -> list[dict[str, torch.Tensor]]:
    """Bytes of small sums and greetings: from `least` to 50 of them."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        texts = [f"{a} plus {b} is {a + b}; {draw.choice(NAMES)} greets {draw.choice(NAMES)}. "
                 for a, b in ((draw.randrange(50), draw.randrange(50)) for _ in range(2))]  # fmt: skip
        ids = torch.tensor([list("".join(texts).encode())[: draw.randint(least, 50)]])
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return found


@functools.cache
def trained(seed: int) -> Any:
    """A tiny Llama after some dozens of steps. Do not change it."""
    model = tiny_llama(seed=seed, num_hidden_layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(120):
        ids = torch.cat([row["input_ids"] for row in rows(1000 * seed + step + 1, 16, least=50)])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def linear(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def measured(model: Any, **options: Any) -> Sensitivity:
    widths = dict.fromkeys(linear(model), (2, 3, 4, 8, 16))
    given = {"rows": rows(0), "group_size": GROUP, **options}
    return measure_sensitivity(model, quantizer(), CONFIG, widths, given.pop("group_size"), given.pop("rows"), **given)


def rounded_alone(model: Any, tell: Callable[[], float]) -> dict[tuple[str, int], float]:
    """What `tell` says while each module in turn is held in fewer bits."""
    found = {}
    for name, module in linear(model).items():
        before = module.weight.detach().clone()
        for bits in (2, 3, 4):
            module.weight.data = ChangemeQuantizer().quantizer_fake_quantize(before, CONFIG, bits, GROUP)
            found[name, bits] = tell()
        module.weight.data = before
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_it_ranks_modules_and_bits_as_their_true_loss_does(seed: int) -> None:
    model = trained(seed)
    ids = torch.cat([row["input_ids"] for row in rows(99, 24, least=50)])
    with torch.no_grad():
        before = model(input_ids=ids).logits.double().log_softmax(-1)

    @torch.no_grad()
    def divergence() -> float:
        after = model(input_ids=ids).logits.double().log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).mean())

    found = measured(model).loss_increase
    true = rounded_alone(model, divergence)
    for widths, least in (((2, 3, 4), 0.9), ((2,), 0.75), ((3,), 0.75), ((4,), 0.75)):
        pairs = [(found[name][bits], loss) for (name, bits), loss in true.items() if bits in widths]
        rank = spearmanr(*zip(*pairs, strict=True)).statistic
        assert rank > least, f"rank correlation {rank:.3f} at {widths} bits"
    ratios = sorted(found[name][4] / loss for (name, bits), loss in true.items() if bits == 4)
    assert 0.5 < ratios[len(ratios) // 2] < 2, "and in nats, where the error is small"


def test_the_model_stays_as_it_is_and_the_same_seed_gives_the_same() -> None:
    model = trained(1).train()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second, other = (measured(model, seed=seed) for seed in (0, 0, 1))
    assert first == second != other
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert [weight for weight in model.parameters() if not weight.requires_grad] == [frozen]
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    frozen.requires_grad_(True)
    model.eval()


def test_padding_counts_for_nothing() -> None:
    model, bare = trained(1), rows(0, least=50)
    filler = torch.full((1, 9), 77)
    ends = {"input_ids": filler, "attention_mask": torch.zeros_like(filler)}
    padded = [{name: torch.cat([tensor, ends[name]], 1) for name, tensor in row.items()} for row in bare]
    one, two = measured(model, rows=bare), measured(model, rows=padded)
    assert one.tokens == two.tokens == 49 * len(bare)
    for name, losses in one.loss_increase.items():
        assert two.loss_increase[name] == pytest.approx(losses, rel=1e-3)
        assert losses[16] == 0 < losses[8] < losses[2]


def test_it_measures_in_bfloat16_too() -> None:
    """Float32 decides the ranks; bfloat16's coarse gradients hardly move them."""
    whole = measured(trained(1)).loss_increase
    half = tiny_llama(num_hidden_layers=4).to(torch.bfloat16)
    half.load_state_dict(trained(1).state_dict())
    coarse = measured(half.eval()).loss_increase
    pairs = [(whole[name][3], coarse[name][3]) for name in whole]
    assert spearmanr(*zip(*pairs, strict=True)).statistic > 0.9


def test_figures_that_are_not_finite_are_refused() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e30
    with pytest.raises(ModelError) as caught:
        measured(model)
    assert "not finite" in caught.value.why and "float32" in caught.value.fix


@pytest.mark.slow
@pytest.mark.parametrize("held", [0, 20_000])
def test_a_large_model_is_measured_in_parts_and_the_figures_are_the_same(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = measured(trained(1), looks_at_data=True)
    monkeypatch.setattr("hyperion.quantization.sensitivity._MOST_HELD", held)
    assert measured(trained(1), looks_at_data=True) == at_once


def test_a_quantizer_that_looks_at_data_is_shown_each_modules_inputs_and_no_padding() -> None:
    class Looks(ChangemeQuantizer):
        def quantizer_fake_quantize(self, weight: Any, config: Any, bits: int, group_size: int, stats: Any) -> Any:  # type: ignore[override]
            shown.append(None if stats is None else stats["second_moment"])
            return super().quantizer_fake_quantize(weight, config, bits, group_size)

    shown: list[Any] = []
    hooks, model = RunHooks(), tiny_llama(seed=3)
    hooks.add(Looks(), "looks")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    given = rows(0, 3, least=45)
    inputs: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0][0].detach()))
    for row in given:
        model(input_ids=row["input_ids"])
    padded = [{key: torch.nn.functional.pad(value, (0, 7)) for key, value in row.items()} for row in given]
    wanted = [torch.cat(inputs[name]) for name in names]
    measure_sensitivity(
        model, hooks.quantizer("looks"), CONFIG, dict.fromkeys(names, (3,)), GROUP, padded, looks_at_data=True
    )
    for x, moment in zip(wanted, shown, strict=True):
        torch.testing.assert_close(moment, x.T @ x / len(x))
    shown.clear()
    measure_sensitivity(model, hooks.quantizer("looks"), CONFIG, dict.fromkeys(names, (3,)), GROUP, given)
    assert shown == [None, None]
