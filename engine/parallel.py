"""Many processes as one: the process group, what ranks tell each other, the rank that died, shards.

Everything here also works in one plain process, without torchrun.
"""

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

SILENCE = 22  # seconds without a heartbeat after which a rank counts as dead
watched = {}  # set by watch_ranks: what its threads and lost_rank share


# ---- the process group ----


def start_ranks():
    """Joins the process group if torchrun started this process. Returns this process's device."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, this_rank, ranks = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(name_of_start(store, this_rank, ranks), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30), store=store,
                                rank=this_rank, world_size=ranks)
        watch_ranks()
    return device


def name_of_start(store, this_rank, ranks):
    """A name shared by the processes that were started together, and by none before them.

    With --max-restarts torchrun keeps its store, and in it the addresses of dead processes;
    connecting to such an address fails. So rank 0 names each start and tells those who ask now.
    """
    me = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    if this_rank > 0:
        store.set(f"asks-{this_rank}", me)
        name = store.get(f"start of {me}").decode()  # waits for rank 0
        store.add(f"{name} arrived", 1)
        return name
    while store.add(f"{me} arrived", 0) < ranks - 1:
        for other in range(1, ranks):
            if store.check([f"asks-{other}"]):
                asking = store.get(f"asks-{other}").decode()
                store.set(f"start of {asking}", me)
        time.sleep(0.05)
    return me


def leave_ranks():
    if dist.is_initialized():
        watched["ended"].set()
        for thread in watched["threads"]:
            thread.join(5)
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
    values = [None] * dist.get_world_size()
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
    """The first rank's value, on every rank."""
    if not dist.is_initialized():
        return value
    message = [value if rank() == 0 else None]
    dist.broadcast_object_list(message)
    return message[0]


def sum_over_ranks(tensor):
    """A tensor on the CPU, summed in place: no pickling, so many numbers are quick."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# ---- the rank that died ----


def watch_ranks():
    """Ends this process, with a line that says which, if another rank shows no sign of life.

    Collectives cannot tell: a rank may keep them waiting for long, while it samples or reads. So
    one thread of each rank counts up its own number in torchrun's store and reads the others';
    another, which no network call can block, counts the seconds without change. A paused process
    counts none.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False)
    number = gather(time.time_ns())[0]  # the store may outlive this group: torchrun restarts
    keys = [f"{number}-{other}" for other in range(world())]
    names = gather(f"rank {rank()} (process {os.getpid()} on {socket.gethostname()})")
    seen, silent, ended = {}, [0] * world(), threading.Event()
    store.add(keys[rank()], 1)
    watched.update(names=names, silent=silent, store=store.clone(), number=number, ended=ended)

    def beat():
        with contextlib.suppress(RuntimeError):  # the store is gone with its machine: see watch
            while not ended.wait(1):
                store.add(keys[rank()], 1)
                for other, count in enumerate(store.multi_get(keys)):
                    if seen.get(other) != count:
                        seen[other] = count
                        silent[other] = 0

    def tell(lost):
        script = os.path.basename(sys.argv[0])
        tqdm.write(f"{script} (rank {rank()}): {lost}", file=sys.stderr)
        os._exit(1)

    def watch():
        while not ended.wait(1):
            silent[:] = [seconds + 1 for seconds in silent]
            if max(silent) >= SILENCE:
                tell(lost_rank())

    def terminate(number, _):
        """torchrun ends the ranks that are left, often before they have missed the lost one."""
        lost = lost_rank()
        if lost:
            tell(lost)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, terminate)
    watched["threads"] = [threading.Thread(target=run, daemon=True) for run in (beat, watch)]
    for thread in watched["threads"]:
        thread.start()


def lost_rank():
    """Which rank is gone, in words, or None. Waits a little: it may have died a moment ago."""
    for _ in range(10):
        deaf = watched["silent"][rank()]  # seconds without news of anybody
        lost = [name for name, seconds in zip(watched["names"], watched["silent"])
                if seconds >= deaf + 4]
        if deaf >= 6:
            return f"rank 0's machine ({os.environ['MASTER_ADDR']}) does not answer: the run ends"
        if lost:
            return f"{', '.join(lost)} has died or hangs: the run ends"
        time.sleep(1)


# ---- one model on many ranks: DDP, or shards (FSDP2) ----


def load_on_first_rank(load):
    """load() on the first rank; on the others the same model, without memory until sharded."""
    model, recipe = None, None
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


def shard(policy, device, precision):
    """Leaves a part of every weight on each rank; each layer is gathered while it runs.

    The first rank holds the weights (see load_on_first_rank) and sends each tensor's parts.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    full = dict(policy.named_parameters()) if rank() == 0 else {}
    mesh = init_device_mesh(device.type, (world(),))
    mixed = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    if precision == "bfloat16":  # layers are gathered in bfloat16: half the traffic, no copies
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    kinds = policy.model._no_split_modules or ()
    layers = [module for module in policy.modules() if type(module).__name__ in kinds]
    for module in (*reversed(layers), policy):  # inner ones first; the policy holds the rest
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=mixed)
    if rank() > 0:
        policy.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if rank() == 0:
                whole = full.pop(name).to(device)
            else:
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            parts = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=0)
            local_shard(parameter).copy_(local_shard(parts))
        for buffer in policy.buffers():
            dist.broadcast(buffer, 0)


def replicate(policy, batch):
    """DDP, whose buckets are the only memory of the gradients.

    A pass that exchanges nothing would allocate a second set of gradients, unless the gradients are
    there already: views of the buckets. DDP makes its buckets at the start, and again in the first
    pass after the first exchange; both happen here, in two passes over a batch without sequences.
    """
    policy = DistributedDataParallel(hold_places(policy), gradient_as_bucket_view=True)
    for number in range(2):
        if number > 0:
            hold_places(policy)
        policy(batch.packed, batch.mask).sum().backward()
    return policy


def hold_places(policy):
    """Gradients of zero without memory, in whose place DDP puts views of its buckets."""
    for p in policy.parameters():
        if p.requires_grad:
            p.grad = p.new_zeros(()).expand_as(p)
    return policy


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def gather_shards(tensor):
    """The whole tensor: every rank must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor):
    """This rank's shard, in place."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole_weights(model):
    """The state dict in the first rank's memory, for save_pretrained; gathers tensor by tensor."""
    gathered, weights = {}, {}  # a tied weight has two names and is gathered once
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            whole = gather_shards(tensor).detach()
            if is_sharded(tensor):
                whole = whole.cpu() if rank() == 0 else None
            gathered[id(tensor)] = whole
        weights[name] = gathered[id(tensor)]
    return weights
