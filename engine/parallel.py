"""Many processes as one: the process group, what ranks tell each other, the rank that died, and shards (FSDP2)."""

import contextlib
import datetime
import os
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist
from tqdm import tqdm


def start_ranks():
    """Joins the process group when torchrun started this process. Returns this process's device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank_, world_ = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=30),
                                store=dist.PrefixStore(name_of_start(store, rank_, world_), store), rank=rank_, world_size=world_)
        watch_ranks()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def name_of_start(store, rank_, world_):
    """A name that the processes started together share, and none before them.

    Under --max-restarts torchrun keeps its store, and in it the addresses of processes that have died: who reads such a
    one is refused there. So rank 0 names each start, and tells it to those that ask now.
    """
    me = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    if rank_ > 0:
        store.set(f"asks-{rank_}", me)
        name = store.get(f"start of {me}").decode()  # waits for rank 0
        store.add(f"{name} arrived", 1)
        return name
    while store.add(f"{me} arrived", 0) < world_ - 1:
        for asks in (f"asks-{other}" for other in range(1, world_)):
            if store.check([asks]):
                store.set(f"start of {store.get(asks).decode()}", me)
        time.sleep(0.05)
    return me


SILENCE = 22  # seconds without a sign of life after which a rank counts as lost; torchrun allows a machine 15


watched = {}  # of watch_ranks: the names of the ranks, the seconds since each one's last sign, and what the threads share


def watch_ranks():
    """Ends this process with a line that says which, when another rank gives no sign of life.

    Collectives cannot tell: a rank may rightly keep them waiting for long, while it samples or reads a file. So a thread
    of each rank counts up a number of its own in torchrun's store and looks at the others'; another thread, which no
    network call can block, counts the seconds in which they stand still. (A paused process counts none.)
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    number = gather(time.time_ns())[0]  # the store may outlive this process group: torchrun restarts
    keys, seen, silent, ended = [f"{number}-{r}" for r in range(world())], {}, [0] * world(), threading.Event()
    store.add(keys[rank()], 1)
    watched.update(names=gather(f"rank {rank()} (process {os.getpid()} on {socket.gethostname()})"), silent=silent,
                   store=store.clone(), number=number, ended=ended)

    def beat():
        with contextlib.suppress(RuntimeError):  # the store went with its machine: watch will tell
            while not ended.wait(1):
                store.add(keys[rank()], 1)
                for r, count in enumerate(store.multi_get(keys)):
                    if seen.get(r) != count:
                        seen[r], silent[r] = count, 0

    def watch():
        while not ended.wait(1):
            silent[:] = [seconds + 1 for seconds in silent]
            if max(silent) >= SILENCE:
                tqdm.write(f"{os.path.basename(sys.argv[0])} (rank {rank()}): {lost_rank()}", file=sys.stderr)
                os._exit(1)

    watched["threads"] = [threading.Thread(target=part, daemon=True) for part in (beat, watch)]
    for thread in watched["threads"]:
        thread.start()


def lost_rank():
    """Which rank is gone, in words, or None; one that died a moment ago is given the time to be missed."""
    for _ in range(10):
        deaf = watched["silent"][rank()]  # seconds without news of anybody
        lost = [name for name, seconds in zip(watched["names"], watched["silent"]) if seconds >= deaf + 4]
        if deaf >= 6:
            return f"rank 0's machine ({os.environ['MASTER_ADDR']}) does not answer: the run ends"
        if lost:
            return f"{', '.join(lost)} has died or stands still: the run ends"
        time.sleep(1)


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
    if world() > 1:
        dist.barrier()


def from_first(value, source=0):
    """The first rank's value (or another's), on every rank. A dict goes entry by entry: no message is larger than one."""
    if world() == 1:
        return value
    message = [list(value) if isinstance(value, dict) else None, None if isinstance(value, dict) else value]
    dist.broadcast_object_list(message, source)
    keys, plain = message
    return plain if keys is None else {key: from_first(value[key] if rank() == source else None, source) for key in keys}


def gather(value):
    """Every rank's value, as a list in rank order, on every rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def shard(policy, device):
    """Leaves a part of every weight on each rank; each layer is put together while it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, kinds = init_device_mesh(device.type, (world(),)), policy.model._no_split_modules or ()
    layers = [module for module in policy.modules() if type(module).__name__ in kinds]
    for module in (*reversed(layers), policy):  # inner ones first; the policy itself holds what is in no layer
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def sharded(tensor):
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """The tensor put together from its shards: every rank must ask for it."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def local(tensor):
    """This rank's shard, in place."""
    return tensor.to_local() if sharded(tensor) else tensor


def mean_over(tensor, axis):
    """The mean of a sharded tensor, whole on every rank where it runs over what is shared out."""
    from torch.distributed.tensor import Replicate

    mean = tensor.mean(axis)
    return mean.redistribute(placements=[Replicate() if part.is_partial() else part for part in mean.placements])


def whole_weights(model):
    """What save_pretrained writes on the first rank; None where it can see for itself."""
    weights = model.state_dict(keep_vars=True)
    return on_first_rank(weights) if any(map(sharded, weights.values())) else None


def on_first_rank(tensors):
    """The same dict with sharded tensors put together, one after the other, in the first rank's own memory."""
    made = {}  # a tied weight has two names and is written once
    for tensor in tensors.values():
        if sharded(tensor) and id(tensor) not in made:
            full = tensor.full_tensor()
            made[id(tensor)] = full.detach().cpu() if rank() == 0 else None
    return {name: made.get(id(tensor), tensor) for name, tensor in tensors.items()}


def laid_out(value, like):
    """A whole value of a checkpoint as `like` is: on its device, or this rank's shard of it."""
    if not torch.is_tensor(value) or value.dim() == 0:
        return value
    if not sharded(like):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
