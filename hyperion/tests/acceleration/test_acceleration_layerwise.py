"""Weights that come to the device layer by layer train what resident ones train, and are gone in between."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hyperion.acceleration import layerwise as subject
from hyperion.acceleration.fused import fused
from hyperion.acceleration.layerwise import layerwise
from hyperion.acceleration.offloading import offloaded

WIDE = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 640, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False}  # fmt: skip
CPU = torch.device("cpu")  # a copy of a weight is a copy there too


def tuned(targets=("q_proj", "v_proj"), *, recompute=0, **lora):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE))
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **lora)
    )
    if recompute:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in base.model.layers[recompute:]:
            layer.gradient_checkpointing = False
    return model.train()


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
    ids=str,
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
    handle = model.base_model.model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with layerwise(model, CPU), torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids)
        handle.remove()
        assert not copies["now"]
        assert torch.equal(model(input_ids=ids).logits, expected)
        written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(written, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))


class Touched(TorchDispatchMode):
    """Which of some tensors an operation reads, but to copy it."""

    def __init__(self, tensors):
        super().__init__()
        self.names = {tensor.untyped_storage()._cdata: name for name, tensor in tensors}
        self.found = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs or {})):
            if isinstance(tensor, torch.Tensor) and operation is not torch.ops.aten._to_copy.default:
                self.found.add(self.names.get(tensor.untyped_storage()._cdata))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("said", [{}, {"use_dora": True}, {"recompute": 2}], ids=str)
@pytest.mark.parametrize("fuses", [False, True])
def test_no_operation_reads_a_weight_where_it_waits(said, fuses):
    """On a GPU it could not."""
    model = tuned(**said)
    waiting = [(name, each.data) for name, each in model.named_parameters() if "layers" in name and is_moved(each)]
    assert len(waiting) == 4 * 5, "q, o, gate, up, down"
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
