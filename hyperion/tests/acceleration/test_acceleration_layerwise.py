"""Weights that come to the device layer by layer train what resident ones train, and are gone in between."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from hyperion_core.errors import ModelError
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from hyperion.acceleration import layerwise as subject
from hyperion.acceleration.fused import fused
from hyperion.acceleration.layerwise import layerwise
from hyperion.acceleration.offloading import offloaded

WIDE = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 640, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False}  # fmt: skip
GPT2 = {"of": "GPT2", "targets": ["c_attn"], "recompute": 99, "fan_in_fan_out": True,
        "shape": {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 640, "n_positions": 64}}  # fmt: skip
MOE = {"of": "Qwen3Moe", "recompute": 99, "shape": {**WIDE, "num_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 128, "decoder_sparse_step": 1, "head_dim": 32}}  # fmt: skip
ZAMBA = {"of": "Zamba", "targets": ["in_proj"], "recompute": 99,
         "shape": {**WIDE, "num_key_value_heads": 4, "attention_head_dim": 64, "num_hidden_layers": 6,
                   "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"], "n_mamba_heads": 2,
                   "use_mamba_kernels": False}}  # fmt: skip
CPU = torch.device("cpu")  # a copy of a weight is a copy there too


def named(said):
    return said.get("of") or str(said)


def tuned(targets=("q_proj", "v_proj"), *, recompute=0, of="Llama", shape=WIDE, **lora):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{of}Config")(**shape))
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **lora)
    model = peft.get_peft_model(base, config)
    if recompute:
        base.activation_checkpointing_enable({"use_reentrant": False})
        for layer in layers_of(model)[recompute:]:
            layer.gradient_checkpointing = False
    return model.train()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def step(model, device="cpu"):
    ids = torch.randint(0, 640, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def is_moved(parameter):
    return not parameter.requires_grad and parameter.nbytes >= subject._LEAST


def size(parameters):
    return sum(each.nbytes for each in parameters if is_moved(each))


@pytest.fixture
def copies(monkeypatch):
    """What is on the device of the weights that come and go: bytes, and the most that there were."""
    alive: dict[int, int] = {}
    seen = {"now": alive, "most": 0, "times": 0}
    made = subject._copy

    def noted(host, device):
        copy = made(host, device)
        key = seen["times"] = seen["times"] + 1
        alive[key] = copy.nbytes
        weakref.finalize(copy.untyped_storage(), alive.pop, key)
        seen["most"] = max(seen["most"], sum(alive.values()))
        return copy

    monkeypatch.setattr(subject, "_copy", noted)
    return seen


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"targets": ["q_proj", "down_proj"], "lora_dropout": 0.1},
        {"use_dora": True},
        {"recompute": 4},
        {"recompute": 2},
    ],
    ids=named,
)
@pytest.mark.parametrize("place", [None, "disk"])
@pytest.mark.parametrize("fuses", [False, True])
def test_the_gradients_are_the_same_and_a_layer_at_a_time_is_there(said, place, fuses, copies, tmp_path):
    model = tuned(**said)
    torch.manual_seed(3)
    with fused(model) if fuses else nullcontext():
        expected = step(model).detach(), gradients(model)
    model.zero_grad()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    layer = model.base_model.model.model.layers[0]
    attention, mlp = (size(part.parameters()) for part in (layer.self_attn, layer.mlp))
    with fused(model) if fuses else nullcontext(), layerwise(model, CPU) as weights:
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(3)
            with offloaded(model, place, tmp_path, weights) if place else nullcontext():
                loss = step(model).detach()
            found = gradients(model)
            assert torch.equal(loss, expected[0]) and found.keys() == expected[1].keys()
            assert all(torch.equal(found[name], gradient) for name, gradient in expected[1].items())
        assert not copies["now"], "nothing stays"
    # a layer whose activations are computed again keeps them until its gradients are there
    assert copies["most"] == mlp + (attention if "recompute" in said else 0)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_without_a_gradient_too_and_after_an_error_nothing_stays(copies):
    model = tuned().eval()
    ids = torch.arange(8)[None]
    expected = model(input_ids=ids).logits
    kept = dict(model.named_parameters())
    for error in (ZeroDivisionError, KeyboardInterrupt):

        def failing(*_, error=error):
            raise error

        handle = model.base_model.model.model.layers[2].mlp.register_forward_hook(failing)
        with pytest.raises(error), layerwise(model, CPU), torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        assert not copies["now"] and all(parameter is kept[name] for name, parameter in model.named_parameters())
    with layerwise(model, CPU), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
        written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(written, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))
    assert "to" not in vars(model)


def test_a_part_that_layers_have_in_common_comes_and_goes_once(copies):
    model = tuned()
    first, second = layers_of(model)[:2]
    second.mlp = first.mlp
    step(model)
    expected = gradients(model)
    model.zero_grad()
    with layerwise(model, CPU) as weights:
        step(model)
        assert not weights._present and not copies["now"], "another tensor may come to lie where one was"
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


def test_what_a_layer_is_must_be_known():
    with pytest.raises(ModelError, match="layer by layer"), layerwise(torch.nn.Linear(256, 256), CPU):
        pass


@pytest.mark.parametrize(("streams", "place"), [(True, None), (True, "disk"), (False, "disk")])
def test_what_no_gradient_comes_to_is_let_go_of(streams, place, tmp_path):
    """Soft-capped logits are the result that their operation keeps; here the loss takes no notice of them."""
    model = tuned(of="Gemma2")
    ids = torch.arange(8)[None]
    states = []
    norm = model.base_model.model.model.norm
    norm.register_forward_pre_hook(lambda _, given: states.append(StorageWeakRef(given[0].untyped_storage())))
    with (
        layerwise(model, CPU) if streams else nullcontext() as weights,
        offloaded(model, place, tmp_path, weights) if place else nullcontext(),
    ):
        model(input_ids=ids)
    assert states[0].expired()


class Touched(TorchDispatchMode):
    """Which of some tensors an operation reads, but to copy it, or to make a view of it."""

    def __init__(self, tensors):
        super().__init__()
        self.names = {tensor.untyped_storage()._cdata: name for name, tensor in tensors}
        self.found = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs or {})):
            copies = operation is torch.ops.aten._to_copy.default or operation.is_view
            if isinstance(tensor, torch.Tensor) and not copies:
                self.found.add(self.names.get(tensor.untyped_storage()._cdata))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("said", [{}, {"use_dora": True}, {"recompute": 2}, GPT2, ZAMBA, MOE], ids=named)
@pytest.mark.parametrize("fuses", [False, True])
def test_no_operation_reads_a_weight_where_it_waits(said, fuses):
    """On a GPU it could not. Whether autograd keeps a view of the weight or itself, and where layers hold layers, or
    lists of modules."""
    model = tuned(**said)
    every = {id(each): each for layer in layers_of(model) for each in layer.parameters() if is_moved(each)}
    waiting = [(name, each.data) for name, each in model.named_parameters() if id(each) in every]
    assert len(waiting) >= 12
    with fused(model) if fuses else nullcontext(), layerwise(model, CPU):
        assert model.to("cuda") is model, "who trains it moves it no more"
        with Touched(waiting) as seen:
            step(model)
    assert seen.found == {None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", [0, 4])
def test_on_a_gpu_they_leave_its_memory(recompute):
    model = tuned(recompute=recompute).cuda()
    step(model, "cuda")
    expected = gradients(model)
    model.zero_grad()
    model.cpu()
    with layerwise(model, torch.device("cuda")):
        held = torch.cuda.memory_allocated()
        step(model, "cuda")
        found = gradients(model)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
        model.zero_grad()
        assert torch.cuda.memory_allocated() <= held + 1024
