"""One run in several processes: starting them, agreeing on numbers, and sharding parameters.

accelerate joins the processes and averages their gradients (DDP). Sharding (FSDP2) applies torch's `fully_shard` to the
whole model as one group. A forward call therefore gathers the parameters once, although it applies the same weights
many times. This also works on CPUs, where accelerate's own FSDP plugin silently copies the parameters instead.
"""

import contextlib
import os
import warnings

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch.utils._pytree import tree_map_only

from src.errors import UserError
from src.runtime import Choice, choose_device, choose_precision


def is_main() -> bool:
    """Whether this is the process that prints and writes files.  Works before accelerate has started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def only_main_speaks():
    """Within this context, stderr of all but the main process is dropped: they would print the same lines."""
    if is_main():
        yield
    else:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            yield


def start_accelerator(config, runtime, model) -> tuple[Accelerator, Choice]:
    """Join the processes of the run; returns (accelerator, precision with the reason for it).  model: a TRMConfig.

    Raises UserError for settings that do not work together on this device."""
    device = choose_device(runtime.device)
    if device.index:
        visible = f"CUDA_VISIBLE_DEVICES={device.index}"
        raise UserError(f"--device {device}: choose the GPU with {visible} and --device cuda")
    precision = choose_precision(runtime.precision, device)
    if precision.value == "fp16" and runtime.precision == "auto" and config.optimizer != "adamw":
        precision = Choice("fp32", f"optimizer {config.optimizer} has no loss scaling for fp16")
    is_fp16 = precision.value == "fp16"
    if is_fp16 and config.optimizer != "adamw":
        problem = f"--optimizer {config.optimizer} has no loss scaling for fp16"
        raise UserError(f"{problem}: choose --precision fp32, or adamw")
    # with act_target `stable`, the first recursion step has no halting loss; in an update right after it, the halting
    # head (q_head) has no gradient, and DDP must expect that. A step may be the only one, with a depth that changes
    unused = config.optimizer_step == "supervision" or (model.halting and model.act_target == "stable")
    ddp = DistributedDataParallelKwargs(find_unused_parameters=unused)
    # fp16 needs accelerate's loss scaler; bf16 needs only autocast, which the trainer enters itself
    mixed = "fp16" if is_fp16 else "no"
    # given as a setting, because accelerate would otherwise read it from the environment, and divide gradients by it
    parts = GradientAccumulationPlugin(num_steps=1)
    options = {"mixed_precision": mixed, "kwargs_handlers": [ddp], "gradient_accumulation_plugin": parts}
    accelerator = Accelerator(cpu=device.type == "cpu", **options)
    if config.shard and accelerator.num_processes == 1:
        raise UserError("--shard needs several processes, but this run has one: see docs/training.md")
    return accelerator, precision


class Agreement:
    """Exchanges small numbers and states between all processes, over CPU connections, so that no GPU has to wait.

    Every process must make the same calls in the same order."""

    def __init__(self, world: int):
        self.world = world
        self.group = dist.new_group(backend="gloo") if world > 1 else None

    def sum(self, *numbers: float) -> list[float]:
        """Returns the sum of each number over all processes."""
        if self.group is None:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(totals, group=self.group)
        return totals.tolist()

    def gather(self, state) -> list:
        """Returns the states of all processes, by rank.  They may be any objects that can be pickled."""
        if self.group is None:
            return [state]
        states = [None] * self.world
        dist.all_gather_object(states, state, group=self.group)
        return states


def shard(model: torch.nn.Module, device: torch.device, world: int):
    """Shard a model's parameters, gradients and (future) optimizer state over all processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh  # imported late: FSDP takes a second
    from torch.distributed.fsdp import fully_shard

    # the warning is about outputs that are views; the only one is the carry (y and z), which nothing writes to
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    fully_shard(model, mesh=init_device_mesh(device.type, (world,)))


def reshard(model: torch.nn.Module):
    """Free the gathered parameters that a sharded model keeps after a forward pass.

    Call this before the parameters change, because the gathered copies would keep the old values."""
    if hasattr(model, "reshard"):
        model.reshard()


def swap_average(model: torch.nn.Module, ema):
    """Exchange a model's weights, which may be sharded, with their moving average.  Does nothing if ema is None."""
    reshard(model)
    if ema is not None:
        ema.swap(model)


def gathered(tree):
    """Returns nested containers with every sharded tensor replaced by the whole one.  All processes must call this."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.full_tensor() if is_sharded(tensor) else tensor, tree)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor.  Asks for an attribute, because importing the class is slow."""
    return hasattr(tensor, "device_mesh")


def placed_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns a whole tensor, equal in all processes, sharded as `like` is; unchanged if `like` is whole."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict):
    """Load a state of whole tensors, {parameter number: entries}, into an optimizer whose parameters may be sharded.

    Learning rates and the other settings of its groups stay as they are. Raises UserError if a shape differs, because
    torch's fused kernels would write out of bounds."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for number, entries in state.items():
        shapes = [getattr(value, "shape", None) for name, value in entries.items() if name != "step"]
        if number not in parameters or any(shape != parameters[number].shape for shape in shapes):
            raise UserError("the checkpoint's optimizer state is for another model: resume from another checkpoint")
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
    """Within this context, backward passes exchange gradients if `syncs`; otherwise each process only adds up its
    own."""
    if hasattr(model, "set_requires_gradient_sync"):  # sharded by fully_shard
        model.set_requires_gradient_sync(syncs)
        yield
    else:
        with contextlib.nullcontext() if syncs else accelerator.no_sync(model):
            yield


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether this error from torch means that another process of the run has died."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)
