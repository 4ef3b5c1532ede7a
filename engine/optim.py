"""The model made ready to learn, the optimizers, bfloat16 weights that are rounded at random."""

import math

import torch

from engine import lora
from engine.common import say
from engine.parallel import local_shard, rank


def prepare_model(settings, model):
    """No dropout, no weights that the loss does not reach, activations computed again if asked.

    With dropout pi/mu would not be 1 before the first step; gradient checkpointing puts layers into
    training mode, which would switch it on. DDP waits for a gradient of every
    weight that is not frozen: those of a vision tower, say, get none.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_dropout = "drop" in name or isinstance(module, torch.nn.Dropout)
            if is_dropout and isinstance(value, float):
                setattr(module, name, 0.0)
    if settings.lora:
        lora.add_adapters(settings, model)
    body, head = model.get_decoder(), model.get_output_embeddings()
    reached = {*body.parameters(), *head.parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(p in reached and ("lora_" in name or not settings.lora))
    checkpoint_layers(settings, model)


def checkpoint_layers(settings, model):
    """Switches gradient checkpointing on; eval() switches it off again."""
    if settings.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23 on
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # transformers checkpoints layers only in training mode


def make_optimizer(settings, model):
    """The optimizer with all of its state: a checkpoint is then loaded in place."""
    weights = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in weights)
    factor = 1 if settings.lora else 0.1
    rate = settings.learning_rate or factor / math.sqrt(count)
    say(
        f"{count:,} weights are trained with {settings.optimizer} at a learning rate of {rate:.2g}"
        + f" = {factor} / sqrt(weights)" * (not settings.learning_rate)
    )
    if settings.optimizer == "adamw":  # fused: one pass over the weights, and no copies of them
        optimizer = torch.optim.AdamW(weights, rate, fused=True, weight_decay=0)
    else:
        from transformers.optimization import Adafactor

        optimizer = Adafactor(weights, rate, scale_parameter=False, relative_step=False)
    for p in weights:
        optimizer.state[p] = first_state(settings, p)
    return optimizer


def first_state(settings, p):
    """What the optimizer would make in its first step, but in float32, and in shards like p."""
    zeros = torch.zeros_like(p, dtype=torch.float32)
    if settings.optimizer == "adamw":  # fused: its step is on the device
        return {
            "step": torch.zeros((), device=p.device),
            "exp_avg": zeros,
            "exp_avg_sq": zeros.clone(),
        }
    if p.ndim == 1:
        return {"step": 0, "exp_avg_sq": zeros}
    return {
        "step": 0,
        "exp_avg_sq_row": zeros[..., 0].clone(),
        "exp_avg_sq_col": zeros[..., 0, :].clone(),
    }


@torch.no_grad()
def update(settings, optimizer, step, steps):
    """One optimizer step. The rate rises over the first --warmup steps; after them it stays, or
    falls as a cosine.

    bfloat16 weights take the step in float32, one tensor at a time, and are rounded at random.
    bfloat16 has 8 significant bits: beside a weight of 0.02 an update of 5e-7 is a 240th of the
    spacing, and rounding to nearest would lose every one of them. Rounded up with the probability
    of the part that is cut off, it is preserved in expectation. (A compensated sum does that, too,
    but needs a second tensor for each weight.)
    """
    (group,) = optimizer.param_groups
    factor, after_warmup = 1.0, step - settings.warmup
    if after_warmup < 0:
        factor = (step + 1) / (settings.warmup + 1)
    elif settings.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * after_warmup / (steps - settings.warmup)))
    group["lr"] = optimizer.defaults["lr"] * factor
    parameters = group["params"]
    if all(p.dtype == torch.float32 for p in parameters):
        return optimizer.step()
    shard = rank() if settings.shard else 0  # under DDP every rank draws the same
    seed = (settings.seed * 1_000_003 + step) * 10_007 + shard
    random = torch.Generator(parameters[0].device).manual_seed(seed)
    for p in parameters:
        if p.grad is None:
            continue
        wide = p.detach().float()
        wide.grad = p.grad.float()
        group["params"] = [wide]
        optimizer.state[wide] = optimizer.state.pop(p)
        optimizer.step()
        optimizer.state[p] = optimizer.state.pop(wide)
        bits = local_shard(wide).view(torch.int32)
        if p.dtype == torch.bfloat16:
            bits += torch.randint(
                2**16, bits.shape, generator=random, dtype=torch.int32, device=bits.device
            )
            bits &= -(2**16)  # cut off what bfloat16 does not hold
        local_shard(p).copy_(bits.view(torch.float32))
    group["params"] = parameters
