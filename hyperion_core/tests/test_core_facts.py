"""What hooks tell each other about models, bits and costs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hyperion_core.facts import BitPlan, Cost, ModelFacts, ModuleFact, Provides, is_output_head
from hyperion_core.live_facts import live_model_facts


def linear(name, out=8, into=4, bias=False):
    return ModuleFact(name, "linear", (out, into), bias)


MODEL = ModelFacts(
    "tiny",
    modules=(
        ModuleFact("model.embed_tokens", "embedding", (16, 4)),
        linear("model.layers.0.self_attn.q_proj", bias=True),
        linear("model.layers.0.mlp.up_proj"),
        linear("model.layers.1.self_attn.q_proj"),
        ModuleFact("model.norm", "norm", (4,)),
        linear("lm_head", 16),
    ),
)


@pytest.mark.parametrize(
    "targets, names",
    [
        ("all-linear", ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"]),
        (["q_proj"], ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        (["mlp.up_proj"], ["layers.0.mlp.up_proj"]),
        (["model.norm"], ["norm"]),
        (["proj"], []),
        (r"model\.layers\.0\..*", ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"]),
        (r"layers\.0", []),
    ],
)
def test_targets_match_as_in_peft(targets, names):
    assert [module.name for module in MODEL.matching(targets)] == [f"model.{name}" for name in names]


def test_a_model_counts_its_parameters_and_names_its_modules():
    assert MODEL.known and not ModelFacts("elsewhere").known
    assert MODEL.parameters == 16 * 4 + (8 * 4 + 8) + 8 * 4 + 8 * 4 + 4 + 16 * 4
    assert MODEL.short_names() == ("q_proj", "up_proj", "lm_head")
    assert MODEL.short_names("embedding") == ("embed_tokens",)
    assert is_output_head("gpt.embed_out") and not is_output_head("model.embed_tokens")


def test_bits_are_the_first_override_that_matches():
    plan = BitPlan(4, 64, {"*.q_proj": (8, 32), "model.layers.0.*": (2, 16)})
    assert plan.of("model.layers.0.self_attn.q_proj") == (8, 32)
    assert plan.of("model.layers.0.mlp.up_proj") == (2, 16)
    assert plan.of("model.layers.1.mlp.up_proj") == (4, 64)


def test_costs_add_up_part_by_part():
    whole = Cost({"weights": 10, "adapter": 1}, {"weights": "ram"}, disk=5, flops=2.0) + Cost({"adapter": 2}, disk=1)
    assert whole == Cost({"weights": 10, "adapter": 3}, {"weights": "ram"}, disk=6, flops=2.0)
    assert whole.total == 13


def test_what_a_quantized_base_offers():
    assert Provides().offers() == {"forward"}
    assert Provides(dequantize=True).offers() == {"forward", "dequantize"}


# --- a loaded model, by its attributes alone --------------------------------------------------------


def weight(*shape):
    return SimpleNamespace(shape=shape, ndim=len(shape))


class Module(SimpleNamespace):
    def named_children(self):
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Module)]


def live(tied):
    embedding = Module(weight=weight(16, 4), embedding_dim=4)
    config = SimpleNamespace(model_type="tiny", hidden_size=4, num_hidden_layers=1, vocab_size=16, _name_or_path="here")
    return Module(
        config=config,
        model=Module(
            embed=embedding,
            packed=Module(weight=weight(1, 99), in_features=4, out_features=8, bias=weight(8)),
            otherwise=Module(qweight=weight(1, 99), in_features=4, out_features=8, bias=None),
            conv=Module(weight=weight(4, 8), nx=4, nf=8, bias=None),
            norm=Module(weight=weight(4)),
            router=Module(weight=weight(2, 3, 4)),
            act=Module(),
        ),
        lm_head=Module(weight=embedding.weight if tied else weight(16, 4), in_features=4, out_features=16),
    )


def test_a_loaded_models_facts_are_its_declared_sizes():
    facts = live_model_facts(live(tied=False))
    assert facts.modules == (
        ModuleFact("model.embed", "embedding", (16, 4)),
        ModuleFact("model.packed", "linear", (8, 4), bias=True),
        ModuleFact("model.otherwise", "linear", (8, 4)),
        ModuleFact("model.conv", "linear", (8, 4)),
        ModuleFact("model.norm", "norm", (4,)),
        ModuleFact("model.router", "other", (2, 3, 4)),
        ModuleFact("lm_head", "linear", (16, 4)),
    )
    assert (facts.source, facts.model_type, facts.hidden_size, facts.layers) == ("here", "tiny", 4, 1)
    assert (facts.vocab_size, facts.context_length, facts.tied_embeddings) == (16, 0, False)


def test_a_tied_head_is_counted_once_and_wrapped_modules_are_unwrapped():
    model = live(tied=True)
    model.model.packed = Module(base=model.model.packed, adapter=Module(weight=weight(2, 4)))
    facts = live_model_facts(model, unwrap=lambda module: getattr(module, "base", module))
    assert facts.tied_embeddings and "lm_head" not in [module.name for module in facts.modules]
    assert ModuleFact("model.packed", "linear", (8, 4), bias=True) in facts.modules
    assert not any("adapter" in module.name for module in facts.modules)
    assert live_model_facts(Module()).why_unknown == "the model has no modules with weights"
