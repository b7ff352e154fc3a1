"""Computes the size and cost of a model: parameters, depth, FLOPs, cache bytes."""

from typing import NamedTuple

from torch import nn

from src.cache import cache_slots
from src.layers import injection_of
from src.model_config import TRMConfig, loss_weights


def count_parameters(model: nn.Module) -> dict:
    """Returns parameter counts: total, trainable, embedding, recursive_core, and per_module as {name: count}.

    A tied parameter is counted once. embedding: all nn.Embedding tables; a tied one is also the head.
    recursive_core: the parameters of model.net if training visits it more than once, else 0.
    per_module: one entry per child module; a tied parameter belongs to the first child that has it."""
    parameters = list(model.parameters())  # yields a tied parameter once
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    config, net, seen, per_module = getattr(model, "config", None), getattr(model, "net", None), set(), {}
    for name, child in model.named_children():
        new = {id(p): p.numel() for p in child.parameters() if id(p) not in seen}
        seen |= new.keys()
        per_module[name] = sum(new.values())
    is_recursive = net is not None and config is not None and config.visits_per_step * config.train_steps > 1
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "embedding": sum(tables.values()),
        "recursive_core": sum(p.numel() for p in net.parameters()) if is_recursive else 0,
        "per_module": per_module,
    }


def format_params(n) -> str:
    """Formats a count with three significant digits: 999, 12.3K, 1.23M, 4.56B."""
    for divisor, suffix in ((1, ""), (1e3, "K"), (1e6, "M"), (1e9, "B"), (1e12, "T")):
        value = n / divisor
        if abs(value) < 999.5 or suffix == "T":
            break
    if not suffix:
        return f"{value:.0f}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{suffix}"


def describe_model(model: nn.Module) -> str:
    """Returns a short description, such as `trm, 1.64M parameters`."""
    return f"{model.config.recursion}, {format_params(sum(p.numel() for p in model.parameters()))} parameters"


class Depth(NamedTuple):
    """The number of blocks that a token passes. A step includes the prelude, and the coda that reads its answer."""

    per_step: int
    total: int


def effective_depth(config: TRMConfig) -> Depth:
    """Returns prelude + visits * n_layers + coda, for one supervision step and for all."""
    ends, step = config.prelude_layers + config.coda_layers, config.visits_per_step * config.n_layers
    return Depth(ends + step, ends + step * config.train_steps)


class Flops(NamedTuple):
    """FLOPs per token; a multiply-add counts as 2.

    matmul: products with weights; attention: the T x T products of scores and values."""

    train_matmul: int
    train_attention: int
    decode_matmul: int
    decode_attention: int

    @property
    def train(self) -> int:
        return self.train_matmul + self.train_attention

    @property
    def decode(self) -> int:
        return self.decode_matmul + self.decode_attention


def flops_per_token(config: TRMConfig, context: int | None = None) -> Flops:
    """Returns the FLOPs per token of training and of decoding at `context` tokens (default: max_seq_len).

    Weights: a multiply-add costs 2 FLOPs in the forward pass and 4 more in the backward pass. A parameter therefore
    costs 6 in a visit with gradient, and 2 in a visit without. Without gradient are all but the last grad_deep_steps of
    trm, supervision steps whose loss has weight 0 (without full_bptt), steps after the last loss, and the second
    read-out of act_target stable.
    Attention: scores and values cost 4*T*D forward and 8*T*D backward per token and layer visit. The whole T x T square
    counts although half of it is masked, as in PaLM (arXiv:2204.02311, appendix B).
    Included: coda, head and halting head, once per supervision step (for the loop: once per visit with a loss; with
    full_bptt: once per step with a loss); the injection and gate of every visit; the prelude, once per supervision step
    because training recomputes x each time (with full_bptt: once in all).
    Not included: embedding look-up, norms, softmax, optimizer, recomputation by gradient checkpointing.
    The prefix tokens of a puzzle are computed too; their cost is added to that of the other tokens.
    Decoding: the forward pass of one new token with a cache of `context` tokens, with every visit, and the coda and
    head once. For a model that is not causal: the forward pass over `context` tokens, divided by their number."""
    steps, costs = config.train_steps, _costs(config, context or config.max_seq_len)
    prelude, coda = config.prelude_layers, config.coda_layers
    cycles = 1 if config.recursion == "none" else config.deep_steps
    grad_cycles = cycles if config.recursion == "none" else config.grad_deep_steps
    is_trm = config.recursion == "trm"
    has_loss = [weight > 0 for weight in loss_weights(config, config.recursion_steps)]
    readouts, readout = sum(has_loss), coda * costs.block + costs.head + costs.halt
    # supervision steps that training runs alone and without gradient, because only their state is wanted
    idle = steps - readouts if is_trm and not config.full_bptt else 0
    entries = 1 if config.full_bptt else steps  # times that the prelude runs
    # act_target stable reads out the answer of the step before a second time, without gradient
    looks = steps - 1 if idle else sum(has_loss[1:])
    second_looks = looks if config.halting and config.act_target == "stable" else 0
    # a cycle without gradient also cuts off the steps before it: those without a loss of their own get none
    is_cut = config.full_bptt and grad_cycles < cycles and is_trm
    grad_cycles *= readouts if is_cut else steps - idle
    cycles *= steps
    # steps after the last loss get no gradient either; the answer of the very last one is read out all the same
    tail = has_loss[::-1].index(True) if config.recursion == "loop" or (is_trm and config.full_bptt) else 0
    grad_cycles -= 0 if is_cut else tail * (cycles // steps if is_trm else 1)
    with_grad = (entries - idle) * prelude * costs.block + grad_cycles * costs.cycle + readouts * readout
    unlearned = idle + second_looks + (tail > 0)  # read-outs without gradient
    without = idle * prelude * costs.block + (cycles - grad_cycles) * costs.cycle + unlearned * readout
    layers_with = (entries - idle) * prelude + grad_cycles * costs.layers + readouts * coda
    layers_without = idle * prelude + (cycles - grad_cycles) * costs.layers + unlearned * coda
    decode_matmul, decode_attention = _decode_macs(config, costs, config.recursion_steps, 1, 1)
    return Flops(
        train_matmul=round(6 * with_grad + 2 * without),
        train_attention=round((6 * layers_with + 2 * layers_without) * costs.attention),
        decode_matmul=round(2 * decode_matmul),
        decode_attention=round(2 * decode_attention),
    )


def decode_flops(config: TRMConfig, depth: float, answers: float = 1, heads: float = 1, context: int | None = None):
    """Returns the FLOPs per token of decoding with `depth` recursion steps; all numbers may be means over tokens.

    answers: how many answers of a token pass the coda and the halting head. heads: how many pass the head. Rules that
    look at each answer before they go on need as many as there are steps. Otherwise as in `flops_per_token`."""
    costs = _costs(config, context or config.max_seq_len)
    return 2 * sum(_decode_macs(config, costs, depth, answers, heads))


class _Costs(NamedTuple):
    """Multiply-adds per token.  cycle: products with weights in a deep step, which has `layers` layers."""

    block: float
    attention: float  # of one layer: scores and values
    cycle: float
    layers: int
    head: int
    halt: float


def _costs(config: TRMConfig, context: int) -> _Costs:
    block, attention, extras = (
        macs if not config.prefix_tokens else macs * (context + config.prefix_tokens) / context  # tokens share its work
        for macs in (*_block_macs(config, context + config.prefix_tokens), _cycle_extras(config))
    )
    cycles = 1 if config.recursion == "none" else config.deep_steps
    layers = config.visits_per_step // cycles * config.n_layers
    halt = (config.d_model if config.causal else config.d_model / context) if config.halting else 0
    return _Costs(block, attention, layers * block + extras, layers, config.d_model * config.vocab_size, halt)


def _decode_macs(config, costs: _Costs, depth, answers, heads) -> tuple[float, float]:
    """Returns the multiply-adds per token of decoding: (products with weights, attention scores and values)."""
    cycles = depth * (config.deep_steps if config.recursion == "trm" else 1)  # a step of the loop is one visit
    ends = config.prelude_layers + answers * config.coda_layers
    matmul = ends * costs.block + cycles * costs.cycle + answers * costs.halt + heads * costs.head
    return matmul, (ends + cycles * costs.layers) * costs.attention


def _block_macs(c: TRMConfig, context: int) -> tuple[int, int]:
    """Returns the multiply-adds per token of one TinyBlock: (products with weights, attention scores and values)."""
    swiglu = 3 * c.d_model * c.d_ff
    if c.mixer == "mlp":  # 3 * L * mixer_ff for each of the D channels of a row, shared by its L tokens
        return swiglu + 3 * c.d_model * c.mixer_ff, 0
    qkv = c.d_model * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim + c.attention_gate * c.d_model * c.n_heads
    return qkv + c.d_model**2 + swiglu, 2 * context * c.d_model


def _cycle_extras(c: TRMConfig) -> int:
    """Returns the multiply-adds per token that one deep step spends on injections and gates."""
    if c.recursion == "none":
        return 0
    latent = c.latent_steps if c.recursion == "trm" else 0  # visits that update z and read x, y, z
    macs, D = injection_of(c).macs, c.d_model
    return latent * macs(3, D) + macs(2, D) + (latent + 1) * c.gate * 2 * D**2


def cache_bytes_per_token(config: TRMConfig, dtype_bytes: int, read_steps: int = 1) -> int:
    """Returns the bytes of key/value cache per token of context, 2 * slots * K * E * bytes; 0 without a cache.

    read_steps: the answers of this many recursion steps are read, counted from the last."""
    if not config.causal or config.mixer != "attention":
        return 0
    return 2 * cache_slots(config, read_steps) * config.n_kv_heads * config.head_dim * dtype_bytes
