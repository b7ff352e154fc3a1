"""Several processes, one run: what they agree on, and parameters that are sharded over them.

accelerate starts and counts the processes and averages gradients (DDP). Sharding (FSDP2) is torch's fully_shard of the
whole model: one gathering per forward call serves every visit, and it runs on CPUs too, where accelerate would quietly
copy instead.
"""

import contextlib
import os
import warnings

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from src.errors import UserError


def is_main() -> bool:
    """Whether this is the process that speaks and writes; known before accelerate has started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def only_main_speaks():
    """Inside, what other processes print on stderr is dropped: the first says the same."""
    if is_main():
        yield
    else:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            yield


class Agreement:
    """Small numbers and states that all processes share, over a CPU connection of their own: no GPU waits for them.

    Every process must ask the same questions in the same order."""

    def __init__(self, world: int):
        self.world = world
        self.group = dist.new_group(backend="gloo") if world > 1 else None

    def sum(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes."""
        if self.group is None:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(totals, group=self.group)
        return totals.tolist()

    def gather(self, state) -> list:
        """Every process's state (anything that pickles; it never leaves the run), by rank."""
        if self.group is None:
            return [state]
        states = [None] * self.world
        dist.all_gather_object(states, state, group=self.group)
        return states


def shard(model: torch.nn.Module, device: torch.device, world: int):
    """Spread a model's parameters, gradients and what optimizers keep of them over all processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh  # here, as FSDP takes a second to import
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of views: the detached carry, which nobody writes to
    fully_shard(model, mesh=init_device_mesh(device.type, (world,)))


def reshard(model: torch.nn.Module):
    """Give up the whole parameters that a sharded model keeps after a forward pass, before its own are changed."""
    if hasattr(model, "reshard"):
        model.reshard()


def gathered(tree):
    """The nest of tensors with whole tensors in the place of sharded ones; all processes must call it."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.full_tensor() if is_sharded(tensor) else tensor, tree)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, whose module takes a while to import where nothing is sharded."""
    return hasattr(tensor, "device_mesh")


def placed_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same in all processes, sharded as `like` is; as it is where `like` is whole."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict):
    """Give an optimizer, whose parameters may be sharded, a state of whole tensors: {number of a parameter: entries}.

    The rates and other settings of its groups stay its own. UserError where shapes differ: fused kernels would write
    out of bounds."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for number, entries in state.items():
        shapes = [getattr(value, "shape", None) for name, value in entries.items() if name != "step"]
        if number not in parameters or any(shape != parameters[number].shape for shape in shapes):
            raise UserError("the checkpoint's optimizer is that of another model: go on from another checkpoint")
    placed = {
        number: {
            name: placed_like(value, parameters[number]) if getattr(value, "ndim", 0) else value
            for name, value in entries.items()
        }
        for number, entries in state.items()
    }
    optimizer.load_state_dict({"state": placed, "param_groups": optimizer.state_dict()["param_groups"]})


@contextlib.contextmanager
def gradient_sync(accelerator, model: torch.nn.Module, syncs: bool):
    """Backward passes inside share their gradients with the other processes, or (not syncs) add them up for later."""
    if hasattr(model, "set_requires_gradient_sync"):  # fully_shard
        model.set_requires_gradient_sync(syncs)
        yield
    else:
        with contextlib.nullcontext() if syncs else accelerator.no_sync(model):
            yield


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether an error of torch says that another process of the run is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)
