"""The optimizers, bfloat16 weights that are rounded at random, and what a card holds."""

import math
import resource

import torch

from engine.common import say
from engine.parallel import local, mean_over, rank, sharded, world


def checkpoint_layers(model):
    """Activations are computed again in the backward pass. The rest of the model stays in eval mode, for with dropout
    pi/mu would not be 1 before the first step; a layer does it only where it believes to be training."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def make_optimizer(settings, model):
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay,
                                 fused=True)  # one pass over the weights instead of nine, and no copies of them
    from transformers.optimization import Adafactor

    optimizer = Adafactor(model.parameters(), settings.learning_rate, scale_parameter=False, relative_step=False,
                          warmup_init=False, weight_decay=settings.weight_decay)
    for p in model.parameters():
        if sharded(p) and p.ndim > 1:  # its own would be plain zeros, which do not mix with shards
            zeros = torch.zeros_like(p, dtype=torch.float32)
            optimizer.state[p] = {"step": 0, "RMS": 0, "exp_avg_sq_row": mean_over(zeros, -1),
                                  "exp_avg_sq_col": mean_over(zeros, -2)}
    return optimizer


@torch.no_grad()
def update(settings, optimizer, step):
    """One optimizer step; bfloat16 weights take it in float32, one tensor at a time, and are rounded at random.

    bfloat16 has 8 bits: beside a weight of 0.02 an update of 5e-7 is a 240th of the spacing, and rounding to nearest
    would lose every one of them in silence. Rounded up with the probability of the part lost, it arrives in the mean.
    (A compensated sum would arrive too, but needs a second tensor for each weight.)
    """
    if settings.weights == "float32":
        return optimizer.step()
    (group,) = optimizer.param_groups
    parameters, shard = group["params"], rank() if settings.shard else 0  # under DDP the same draws on every rank
    random = torch.Generator(parameters[0].device).manual_seed((settings.seed * 1_000_003 + step) * 10_007 + shard)
    for p in parameters:
        if p.grad is None:
            continue
        wide = p.detach().float()
        wide.grad, p.grad = p.grad.float(), None
        group["params"], optimizer.state[wide] = [wide], optimizer.state.pop(p, {})
        optimizer.step()
        optimizer.state[p] = optimizer.state.pop(wide)
        bits = local(wide).view(torch.int32)
        bits += torch.randint(2**16, bits.shape, generator=random, dtype=torch.int32, device=bits.device)
        local(p).copy_((bits & -(2**16)).view(torch.float32))  # cuts off what bfloat16 does not hold
    group["params"] = parameters


def memory(settings, model, tokens, ranks=1):
    """The bytes that a card holds at most, by part, with so many tokens in the largest forward pass.

    Weights, gradients and optimizer state are exact; DDP adds nothing, its buckets are the gradients. Activations are
    those of Llama's layer (norms, grouped attention that never holds [time, time], gated MLP): for others an estimate.
    """
    config, shapes = model.config.get_text_config(), [p.shape for p in model.parameters()]
    count, largest = sum(map(math.prod, shapes)), max(map(math.prod, shapes))
    size = 2 if settings.weights == "bfloat16" else 4  # of a weight, a gradient and what runs along the layers
    mixed = settings.precision == "bfloat16" and size == 4
    moments = lambda s: math.prod(s[:-1]) + math.prod(s[:-2] + s[-1:]) if len(s) > 1 else math.prod(s)
    state = 2 * count if settings.optimizer == "adamw" else sum(map(moments, shapes))
    steady = {"weights": size * count, "gradients": size * count, "optimizer": 4 * state}

    width, vocab, layers, heads = config.hidden_size, config.vocab_size, config.num_hidden_layers, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    attention = 2 * head * (heads + (getattr(config, "num_key_value_heads", None) or heads))  # queries, output; keys, values
    gated = getattr(config, "intermediate_size", None) or 4 * width
    norms = 26 if mixed else 16 if size == 2 else 24  # bytes: of each of two the input, in float32, and what comes out
    inside = tokens * (norms * width + (2 if mixed else size) * (attention + 4 * gated))  # gate, its silu, up, product
    again = settings.gradient_checkpointing  # then only what goes into a layer is kept, and each runs again with gradients
    parts = {"activations": layers * tokens * width * size if again else layers * inside,
             "a layer again": inside + 2 * tokens * gated * (2 if mixed else size) if again else 0,
             "logits": 12 * vocab * min(tokens, max(1, 2**26 // vocab)) + 2 * vocab * width * size,  # a chunk; head's gradients
             "copies": 2 * count if mixed else 0}  # autocast keeps the weights in bfloat16 during the forward pass
    if settings.shard:
        steady = {name: value // ranks for name, value in steady.items()}
        outside = vocab * width * (1 if config.tie_word_embeddings else 2)
        steady["put together"] = 2 * size * (outside + 2 * (count - outside) // layers)  # two layers, with their gradients
    update = (16 * largest if size == 2 else 8 * largest if settings.optimizer == "adafactor" else 4 * count)
    update //= ranks if settings.shard else 1
    passes = parts["activations"] + max(parts["a layer again"], parts["logits"] + parts["copies"])
    return {**steady, **parts, "update": update, "at most": sum(steady.values()) + max(passes, update)}


def say_memory(settings, model, data):
    """Before the first step: what it will need, where that is anything to speak of."""
    longest, share = data.lengths.max(), math.ceil(settings.sequences / world())
    tokens = max(settings.tokens_per_pass, longest)
    needs = memory(settings, model, min(tokens, (settings.micro_batch or share) * longest), world())
    if needs["at most"] > 2**30:
        card = f" of the card's {torch.cuda.mem_get_info()[1] / 2**30:.1f}" if torch.cuda.is_available() else ""
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in needs.items() if size)
        say(f"memory in GiB: {parts}{card}")


def peak_memory():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
