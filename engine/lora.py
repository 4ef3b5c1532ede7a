"""LoRA: adapters of low rank beside all linear layers are trained in place of the weights.

An adapter changes nothing at its start, so log mu of the starting weights is that of the run.
"""

import torch
from safetensors.torch import save_file

from engine.common import Problem


def make_config(settings):
    try:
        from peft import LoraConfig
    except ImportError:
        raise Problem("--lora needs the package peft: pip install peft")
    return LoraConfig(
        r=settings.lora,
        lora_alpha=2 * settings.lora,  # an adapter's output counts alpha / rank times
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        base_model_name_or_path=settings.model,
    )


def add_adapters(settings, model):
    """Adds adapters in float32, equal on all ranks."""
    config = make_config(settings)
    from peft import inject_adapter_in_model

    torch.manual_seed(settings.seed)
    inject_adapter_in_model(config, model)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()


def save_adapters(settings, weights):
    """Writes OUT/adapter, for PeftModel.from_pretrained."""
    folder = f"{settings.out}/adapter"
    make_config(settings).save_pretrained(folder)
    save_file(
        {
            f"base_model.model.{name.replace('.default', '')}": tensor.contiguous()
            for name, tensor in weights.items()
            if "lora_" in name
        },
        f"{folder}/adapter_model.safetensors",
    )


@torch.no_grad()
def merge(model):
    """Adds the adapters to the weights of their layers: W + 2 B A."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merge()


def without_adapters(weights):
    """The state dict of the model itself."""
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in weights.items()
        if "lora_" not in name
    }
