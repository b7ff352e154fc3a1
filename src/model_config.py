"""Settings of a model and of its depth. Scripts read them before they import PyTorch."""

from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Literal

from src.config import literal_fields

DEEPEST = 1000  # recursion steps; each needs its own cache slots
# upper limits, far above any real model: a larger value is a mistake, refused before memory is allocated
LIMITS = dict.fromkeys(("vocab_size", "d_model", "n_heads", "n_kv_heads", "d_ff"), 2**24)
LIMITS |= dict.fromkeys(("max_seq_len", "rope_trained_len", "attention_window"), 2**30) | {"mixer_ff": 2**24}
LIMITS |= dict.fromkeys(("n_layers", "latent_steps", "deep_steps", "supervision_steps", "grad_deep_steps"), 10_000)
FROM_ZERO = {"prelude_layers": 10_000, "coda_layers": 10_000, "act_weight": 1e9}
FROM_ZERO |= {"start_noise": 1e6, "embed_mean": 1e6, "prefix_tokens": 10_000, "puzzle_ids": 2**24, "puzzle_dim": 2**24}
MOST_BLOCKS = 2**14  # blocks that one token passes through


@dataclass
class TRMConfig:
    """Settings of the model. `recursion` selects the family. Settings that a family does not use are ignored.

    Args:
        vocab_size: V, number of tokens: the size of a tokenizer that the run trains (by default 4,096). A given
            tokenizer has its own size
        d_model: D, width of the residual stream
        n_heads: H, query heads; the head size is D/H
        n_kv_heads: K, key/value heads, shared by groups of H/K query heads; default n_heads
        n_layers: blocks of the network that is applied repeatedly
        d_ff: hidden width of SwiGLU; default 8/3 D, rounded up to a multiple of 64
        max_seq_len: context length in tokens
        causal: whether a token attends only to itself and to earlier tokens. train_trm_lm.py trains only causal models,
            train_puzzles.py only models that are not causal
        mixer: how information moves between tokens: attention, or mlp (MLPMixer1D), which only train_puzzles.py can
            train, because it needs rows of one length and is not causal
        attention_window: a token attends only to tokens less than this many positions away; default no limit
        mixer_ff: hidden width of mixer mlp; default 8/3 of the positions in a row, rounded up to a multiple of 64
        positions: rope (rotary), learned (an embedding added to x) or none
        rope_theta: base of the rotary frequencies
        rope_scaling: divides the rotary positions, for a context this many times as long as in training; default 1
        rope_trained_len: context length of the original training in tokens; if given, rope_scaling uses YaRN
        norm: where RMSNorm is: post (after each sublayer, the TRM paper), pre (before it, Llama), sandwich (both)
        norm_eps: epsilon inside RMSNorm
        norm_gain: give each RMSNorm a learned weight per channel; the authors' code of TRM has none
        qk_norm: apply RMSNorm to queries and keys, per head
        attention_gate: multiply the output of each attention head by 2 sigmoid(w x), where x is the input of attention
            and w is learned; the factor starts at 1
        dropout: dropout probability for attention weights and for the outputs of attention and SwiGLU
        visit_dropout: loop only: in training, probability that a token skips a visit; the first visit is never skipped
        start_noise: loop with injection sum or concat only: in training, start from normal noise with this standard
            deviation instead of from 0
        tie_embeddings: use the embedding matrix as the output head
        embed_scale: factor on the embeddings; default sqrt(d_model) for a recursive model with tie_embeddings and for
            weight_init truncated, else 1
        weight_init: distribution of the initial weights: normal, or truncated as in the authors' code of TRM (truncated
            normal; embeddings have the standard deviation 1/sqrt(d_model))
        embed_mean: size of a random vector that all initial embeddings share, in their standard deviations: they start
            around this vector instead of around 0, and so the network, which has no biases, gets a constant input.
            Default 1 for causal models of recursion none and loop, and 0 for trm, whose first state is constant
        prefix_tokens: train_puzzles.py only: number of extra tokens before the cells of a puzzle; they have no loss
        puzzle_ids: train_puzzles.py only: number of puzzle identifiers; the embedding of a puzzle's identifier fills
            the prefix. 0 = one learned prefix for all puzzles
        puzzle_dim: train_puzzles.py only: width of the embedding of a puzzle identifier; zeros fill the rest of the
            prefix. Default d_model, or the whole prefix if puzzle_ids is 0
        recursion: none = plain transformer (Llama), loop = looped transformer, trm = the two-stream recursion
        prelude_layers: blocks before the recursion, with their own weights
        coda_layers: blocks after the recursion, with their own weights
        injection: how a visit combines x, y and z: sum (the paper), concat (a linear layer over all three) or none
            (loop only: the loop starts at y = x and does not read x again)
        gate: at each visit, mix the old and the new state by an element-wise gate
        latent_steps: trm only: n, number of updates of z before each update of y
        deep_steps: T, number of cycles (n updates of z, one of y) per supervision step (trm), or of visits (loop)
        supervision_steps: trm only: N_sup, number of supervision steps, with a loss after each
        grad_deep_steps: how many deep steps, counted from the last, carry gradient; default 1 for trm, all for loop
        full_bptt: back-propagate through all supervision and deep steps; memory grows with their number
        supervision_weights: weights of the losses after each supervision step (trm) or visit (loop): equal, linear,
            last, or numbers such as 0.3,1.0; default equal for trm, last for loop; train_puzzles.py: loop only
        token_loss: softmax (cross-entropy), or stablemax (arXiv:2501.04697; train_puzzles.py only)
        loss_mean: average the loss over all target tokens of a batch (token), or over each row first (row)
        halting: give the model a halting head; default true for trm, false for loop
        act_weight: weight of the halting loss
        act_target: what the halting head predicts: correct (the most probable token is right) or stable (one more step
            does not change the most probable token)
        act_threshold: text only: at inference with --exit halt, a token stops if its halting probability exceeds this
        gradient_checkpointing: recompute each visit in the backward pass, which saves memory and takes more time
        pad_token_id: id of the padding token; training takes it from the tokenizer
    """

    vocab_size: int | None = None
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int | None = None
    n_layers: int = 2
    d_ff: int | None = None
    max_seq_len: int = 256
    causal: bool = True
    mixer: Literal["attention", "mlp"] = "attention"
    attention_window: int | None = None
    mixer_ff: int | None = None
    positions: Literal["rope", "learned", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: float | None = None
    rope_trained_len: int | None = None
    norm: Literal["post", "pre", "sandwich"] = "post"
    norm_eps: float = 1e-5
    norm_gain: bool = True
    qk_norm: bool = False
    attention_gate: bool = False
    dropout: float = 0.0
    visit_dropout: float = 0.0
    start_noise: float = 0.0
    tie_embeddings: bool = False
    embed_scale: float | None = None
    weight_init: Literal["normal", "truncated"] = "normal"
    embed_mean: float | None = None
    prefix_tokens: int = 0
    puzzle_ids: int = 0
    puzzle_dim: int | None = None
    recursion: Literal["none", "loop", "trm"] = "trm"
    prelude_layers: int = 0
    coda_layers: int = 0
    injection: Literal["sum", "concat", "none"] = "sum"
    gate: bool = False
    latent_steps: int = 2
    deep_steps: int = 2
    supervision_steps: int = 2
    grad_deep_steps: int | None = None
    full_bptt: bool = False
    supervision_weights: str | None = None
    token_loss: Literal["softmax", "stablemax"] = "softmax"
    loss_mean: Literal["token", "row"] = "token"
    halting: bool | None = None
    act_weight: float = 1.0
    act_target: Literal["correct", "stable"] = "correct"
    act_threshold: float = 0.95
    gradient_checkpointing: bool = False
    pad_token_id: int | None = None

    def __post_init__(self):
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.d_ff = _hidden_width(self.d_model) if self.d_ff is None else self.d_ff
        self.mixer_ff = _hidden_width(self.positions_per_row) if self.mixer_ff is None else self.mixer_ff
        self.halting = self.recursion == "trm" if self.halting is None else self.halting
        if self.puzzle_dim is None:  # without identifiers, one vector fills the whole prefix
            self.puzzle_dim = self.d_model if self.puzzle_ids else self.d_model * self.prefix_tokens
        if self.grad_deep_steps is None:
            self.grad_deep_steps = 1 if self.recursion == "trm" and not self.full_bptt else self.deep_steps
        if self.embed_scale is None:  # tied weights are small for the head; states need unit size
            is_small = self.tie_embeddings and self.recursion != "none" or self.weight_init == "truncated"
            self.embed_scale = self.d_model**0.5 if is_small else 1.0
        if self.embed_mean is None:
            self.embed_mean = float(self.causal and self.recursion != "trm")
        for problem, advice in self._problems():
            if problem:
                raise ValueError(advice)

    def _problems(self):
        """Yields (is it wrong?, what to change) for every value and combination that is not allowed."""
        for name, most in (LIMITS | FROM_ZERO).items():
            value, least = getattr(self, name), int(name in LIMITS)
            is_none = value is None and name in ("vocab_size", "rope_trained_len", "attention_window")
            yield not is_none and not value >= least, f"{name} is {value}: set it to {least} or more"
            yield not is_none and value > most, f"{name} is {value}: set it to {most:,} or less"
        for name, allowed in literal_fields(type(self)).items():
            yield getattr(self, name) not in allowed, f"{name} is {getattr(self, name)!r}: choose {', '.join(allowed)}"
        D, H, K, G, T = self.d_model, self.n_heads, self.n_kv_heads, self.grad_deep_steps, self.deep_steps
        yield D % H != 0, f"d_model {D} does not divide into n_heads {H}: make d_model a multiple of n_heads"
        yield H % K != 0, f"n_heads {H} is no multiple of n_kv_heads {K}: make n_kv_heads a divisor of n_heads"
        odd = self.positions == "rope" and self.mixer == "attention" and (D // H) % 2
        yield odd, f"rotary positions pair channels, but the head size {D // H} is odd: change d_model or n_heads"
        for name in ("dropout", "visit_dropout"):
            value = getattr(self, name)
            yield not 0 <= value < 1, f"{name} is {value}: set it to 0 or more and under 1"
        yield not 0 < self.act_threshold <= 1, f"act_threshold is {self.act_threshold}: set it above 0, up to 1"
        for name in ["norm_eps", "rope_theta", "embed_scale"] + ["rope_scaling"] * (self.rope_scaling is not None):
            value = getattr(self, name)
            yield not 0 < value < 1e12, f"{name} is {value}: set it above 0, below 1e12"
        turns = self.rope_theta <= 1 and self.rope_scaling is not None and self.rope_trained_len is not None
        yield turns, f"rope_theta is {self.rope_theta}, but YaRN (rope_trained_len) needs over 1: raise it"
        outside = self.vocab_size is not None and not 0 <= (self.pad_token_id or 0) < self.vocab_size
        yield outside, f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}: correct it"
        sees_all = self.mixer == "mlp" and self.causal
        yield sees_all, "mixer mlp sees all positions, so it cannot be causal: set mixer to attention"
        prefix = self.prefix_tokens
        seen = prefix > 0 and self.causal
        yield seen, f"prefix_tokens {prefix} are for train_puzzles.py; a causal model has none: leave them out"
        missing = self.puzzle_ids > 0 and prefix == 0
        yield missing, f"puzzle_ids is {self.puzzle_ids}, but there is no prefix to put them in: set prefix_tokens"
        wide = self.puzzle_dim > prefix * D
        yield wide, f"puzzle_dim {self.puzzle_dim} does not fit into {prefix} prefix_tokens of {D}: raise prefix_tokens"
        headless = self.halting and self.recursion == "none"
        yield headless, "recursion none has a single visit, so nothing can halt: set halting to false"
        is_bare = self.injection == "none"
        yield is_bare and self.recursion == "trm", "injection none is for recursion loop: choose sum or concat"
        yield self.recursion != "none" and G > T, f"grad_deep_steps {G} is more than deep_steps {T}: lower it"
        cut = is_bare and self.recursion == "loop" and G < T
        yield cut, f"injection none gives the embedding no gradient under grad_deep_steps {G}: set it to deep_steps {T}"
        blocks = self.visits_per_step * self.train_steps * self.n_layers + self.prelude_layers + self.coda_layers
        far = f"a token would pass through {blocks:,} blocks, over {MOST_BLOCKS:,}: choose fewer steps or layers"
        yield blocks > MOST_BLOCKS, far
        weights = self.supervision_weights
        wrong = weights is not None and not valid_weights(weights, self.recursion_steps)
        yield wrong, f"supervision_weights is {weights!r}: choose equal, linear, last, or such as 0.3,1.0"

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def positions_per_row(self) -> int:
        """Positions of a full row: the prefix and the tokens."""
        return self.prefix_tokens + self.max_seq_len

    @property
    def head_dim(self) -> int:
        """E, channels of one attention head."""
        return self.d_model // self.n_heads

    @property
    def train_steps(self) -> int:
        """Supervision steps of one batch. Only the trm family has more than one."""
        return self.supervision_steps if self.recursion == "trm" else 1

    @property
    def visits_per_step(self) -> int:
        """Number of times the network is applied in one supervision step."""
        return {"none": 1, "loop": self.deep_steps, "trm": self.deep_steps * (self.latent_steps + 1)}[self.recursion]

    @property
    def recursion_steps(self) -> int:
        """Number of answers per batch in training: one after each supervision step (trm) or visit (loop)."""
        return {"none": 1, "loop": self.deep_steps, "trm": self.supervision_steps}[self.recursion]


def _hidden_width(size: int) -> int:
    """Returns 8/3 of a width, rounded up to a multiple of 64.

    With this hidden width, SwiGLU has as many weights as a plain layer whose hidden width is 4 times its width."""
    return -(-8 * size // (3 * 64)) * 64


def model_settings(config: TRMConfig) -> dict:
    """Returns the settings for config.yaml. A value that follows from others is None, so that it is derived again."""
    follows = (
        "n_kv_heads",
        "d_ff",
        "mixer_ff",
        "puzzle_dim",
        "halting",
        "embed_scale",
        "embed_mean",
        "grad_deep_steps",
    )
    derived = [name for name in follows if replace(config, **{name: None}) == config]
    return config.to_dict() | dict.fromkeys(derived)


THRESHOLDS = {"halt": "act_threshold", "kl": "kl_threshold"}  # exit rule -> its setting in ExitRule


@dataclass(frozen=True)
class ExitRule:
    """When a token stops recursing. A recursion step is a supervision step (trm) or a visit (loop).

    Args:
        exit: when a token stops: fixed (after max_recursion_depth steps), halt (when the halting head is confident) or
            kl (when a step changes its next-token distribution by less than kl_threshold)
        max_recursion_depth: most recursion steps per token; default as many as in training; may be more
        act_threshold: for halt, stop above this halting probability; default that of the model
        kl_threshold: for kl, stop if KL(after the step || before it) is below this, in nats; default 0.01
        patience: for halt and kl, stop a token when the rule has held for this many steps in a row. Other tokens see
            what a token found in a step only if it runs one more step, so 2 can be better than 1
    """

    exit: Literal["fixed", "halt", "kl"] = "fixed"
    max_recursion_depth: int | None = None
    act_threshold: float | None = None
    kl_threshold: float | None = None
    patience: int = 1

    def __post_init__(self):
        depth = self.max_recursion_depth
        if depth is not None and not 1 <= depth <= DEEPEST:
            raise ValueError(f"max_recursion_depth is {depth}: set it to 1 or more, up to {DEEPEST}")
        if self.act_threshold is not None and not 0 <= self.act_threshold <= 1:
            raise ValueError(f"act_threshold is {self.act_threshold}: set it from 0 to 1")
        if self.kl_threshold is not None and not self.kl_threshold >= 0:
            raise ValueError(f"kl_threshold is {self.kl_threshold}: set it to 0 or more")
        if not 1 <= self.patience <= DEEPEST:
            raise ValueError(f"patience is {self.patience}: set it to 1 or more, up to {DEEPEST}")
        if self.patience > 1 and not self.adapts:
            raise ValueError("patience is for --exit halt and kl: choose one of them, or leave it out")
        for exit, name in THRESHOLDS.items():
            if getattr(self, name) is not None and self.exit != exit:
                raise ValueError(f"{name} is for --exit {exit}: choose that, or leave it out")

    @property
    def adapts(self) -> bool:
        """Whether tokens may stop before max_recursion_depth."""
        return self.exit != "fixed"

    def check(self, config) -> "ExitRule":
        """Returns the rule itself.  Raises ValueError if a model with this TRMConfig cannot follow it."""
        if config.recursion == "none" and (self.exit != "fixed" or (self.max_recursion_depth or 1) > 1):
            raise ValueError("recursion none has a single visit: choose exit fixed, and no max_recursion_depth")
        if self.exit == "halt" and not config.halting:
            raise ValueError(f"this {config.recursion} model has no halting head: choose exit kl or fixed")
        if self.exit != "fixed" and not (config.causal and config.mixer == "attention"):
            raise ValueError("only a causal model with attention can stop tokens one by one: choose exit fixed")
        return self


def step_weights(spec: str, steps: int) -> list[float]:
    """Returns the weights of steps 0..steps-1 that `supervision_weights` describes, not normalised.

    `equal`, `linear` (step s has weight s + 1), `last`, or numbers such as `0.3,1.0`; the last number is repeated."""
    if spec == "equal":
        return [1.0] * steps
    if spec == "linear":
        return [s + 1.0 for s in range(steps)]
    if spec == "last":
        return [0.0] * (steps - 1) + [1.0]
    numbers = [float(part) for part in spec.split(",")]
    return (numbers + [numbers[-1]] * steps)[:steps]


def valid_weights(spec: str, steps: int) -> bool:
    """Whether this is a valid `spec`: no weight is negative or infinite, and the last one is positive."""
    try:
        weights = step_weights(spec, max(steps, 1 + spec.count(",")))
    except ValueError:
        return False
    return min(weights) >= 0 and sum(weights) < inf and (weights[-1] > 0 or weights[steps - 1] > 0)


def loss_weights(config: TRMConfig, end: int, first: int = 0) -> list[float]:
    """Returns the weights of the losses after recursion steps first..end-1 of a model, not normalised.

    By default, all supervision steps of trm have equal weights, and only the last visit of the loop has a loss. Visits
    of the loop without gradient have weight 0. If all weights up to `end` would be 0, the last step gets weight 1."""
    is_loop = config.recursion == "loop"
    weights = step_weights(config.supervision_weights or ("last" if is_loop else "equal"), end)
    if is_loop:
        frozen = config.deep_steps - config.grad_deep_steps
        weights = [w if t % config.deep_steps >= frozen else 0.0 for t, w in enumerate(weights)]
    if not any(weights):
        weights[-1] = 1.0
    weights = weights[first:]
    # a step whose weight is 0 may be run alone: then its own loss is the loss
    return weights if any(weights) else [1.0] * len(weights)
