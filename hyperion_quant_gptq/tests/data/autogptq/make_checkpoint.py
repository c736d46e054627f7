"""Makes the checkpoints beside it with auto-gptq 0.7.1, its own GPTQ and its own packer, on a CPU.

    python3.11 -m venv old
    old/bin/pip install setuptools wheel numpy==1.26.4 torch==2.13.0 transformers==4.40.2 peft==0.10.0 \
        accelerate==0.29.3 datasets==2.19.1 pyarrow==16.1.0 safetensors==0.4.3 sentencepiece rouge gekko
    BUILD_CUDA_EXT=0 old/bin/pip install --no-deps --no-build-isolation --no-binary auto-gptq auto-gptq==0.7.1
    old/bin/python make_checkpoint.py

All but torch are the versions of 2024; its packer is plain arithmetic of torch and numpy. `*.weights.safetensors` hold
what auto-gptq's own modules multiply with: their answers to the unit vectors, in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling import LlamaGPTQForCausalLM
from auto_gptq.modeling._utils import find_layers, pack_model
from auto_gptq.quantization import GPTQ
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}


def make(folder: Path, bits: int, group_size: int, desc_act: bool) -> None:
    torch.manual_seed(bits)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, **SIZE))
    model = model.half().eval()
    found = {}
    for name, layer in find_layers(model.model.layers).items():
        task = GPTQ(layer)
        task.quantizer.configure(bits, perchannel=True, sym=True)
        mixed = torch.randn(layer.in_features, layer.in_features)
        for _ in range(4):
            inputs = torch.randn(1, 64, layer.in_features) @ mixed
            task.add_batch(inputs, None)
        scale, zero, g_idx = task.fasterquant(group_size=group_size, actorder=desc_act)
        found[f"model.layers.{name}"] = (task.quantizer, scale, zero, g_idx)
    pack_model(model, found, bits, group_size, desc_act=desc_act)
    config = BaseQuantizeConfig(bits=bits, group_size=group_size, desc_act=desc_act, sym=True)
    config.model_file_base_name = "model"  # its own default, gptq_model-4bit-32g, is found by auto-gptq alone
    LlamaGPTQForCausalLM(model, True, config).save_quantized(str(folder))
    (folder / "quantize_config.json").unlink()  # config.json has the same
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight") and name.endswith(("q_proj", "down_proj")):
            module.scales = module.scales.float()
            module.autogptq_cuda_available = False
            weights[name] = module(torch.eye(module.infeatures)).T.contiguous()
    save_file(weights, f"{folder}.weights.safetensors")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.cuda.synchronize = lambda: None  # auto-gptq calls it to take the time, and nothing else of it needs CUDA
    make(HERE / "4bit-desc_act", 4, 32, desc_act=True)
    make(HERE / "3bit", 3, 32, desc_act=False)
