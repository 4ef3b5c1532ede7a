"""Many processes as one: the process group, what ranks tell each other, DDP, shards (FSDP2).

Everything here also works in one plain process, without torchrun. A rank that dies is torchrun's
matter: it ends the other ranks of its machine. A rank that hangs is ended by the group's timeout.
"""

import datetime
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

LONGEST_WAIT = datetime.timedelta(hours=2)  # of one rank for another, which may still sample


# ---- the process group ----


def start_ranks():
    """Joins the process group if torchrun started this process. Returns this process's device."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    return device


def leave_ranks():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def gather(value):
    """Every rank's value, as a list in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gather_on_first(value):
    """Every rank's value, as a list in rank order on the first rank; an empty list elsewhere."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def from_first(value):
    """The first rank's value, on every rank; a small one."""
    return gather(value)[0]


# ---- one model on many ranks: DDP, or shards (FSDP2) ----


def replicate(policy, batch):
    """DDP, whose buckets are the only memory of the gradients.

    DDP makes its buckets at the start, and again in the first pass after the first exchange, and
    only then are gradients views of them. Both happen here, in two passes over a batch without
    sequences, before the optimizer takes its memory.
    """
    policy = DistributedDataParallel(policy, gradient_as_bucket_view=True)
    for _ in range(2):
        policy(batch.packed, batch.mask).sum().backward()
    return policy


def load_on_first_rank(load):
    """load() on the first rank; on the others the same model, without memory until sharded."""
    recipe = None
    if rank() == 0:
        model = load()
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        recipe = type(model), model.config, dtypes
    kind, config, dtypes = from_first(recipe)
    if rank() > 0:
        with torch.device("meta"):
            model = kind(config).eval()
        for name, p in model.named_parameters():
            p.data = p.data.to(dtypes[name])
    return model


def shard(policy, device):
    """Leaves a part of every weight on each rank; each layer is gathered while it runs.

    The first rank holds the weights (see load_on_first_rank) and sends each tensor's parts.
    """
    from torch.distributed import init_device_mesh
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    full = policy.state_dict() if rank() == 0 else {}
    mesh = init_device_mesh(device.type, (world(),))
    # Layers are gathered in bfloat16, if they compute in it: half the traffic, no copies.
    gathered = torch.bfloat16 if policy.autocasts else None
    mixed = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
    kinds = policy.model._no_split_modules or ()
    layers = [module for module in policy.modules() if type(module).__name__ in kinds]
    for module in (*reversed(layers), policy):  # inner ones first; the policy holds the rest
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=mixed)
    if rank() > 0:
        policy.to_empty(device=device)
    set_model_state_dict(
        policy, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    for buffer in policy.buffers():  # some are in no state dict
        dist.broadcast(buffer, 0)


def whole_weights(model):
    """The state dict in the first rank's memory, for save_pretrained: every rank must call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    once = dict([*model.named_parameters(), *model.named_buffers()])
    return {name: tensor for name, tensor in weights.items() if name in once}  # not a tied one


def local_shard(tensor):
    """This rank's shard, in place."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
