"""The slow twin of src/model.py: the same equations in explicit loops, row by row and head by head, no shared code.

Everything is plain differentiable torch on (T, D) matrices in the dtype of the weights given.
"""

import math

import torch

IGNORE = -100


def rms_norm(v, weight, eps):
    """weight None: a norm without gain."""
    normed = v / torch.sqrt((v * v).mean(dim=-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def softmax(scores):
    """Over the last dimension; -inf marks what may not be seen."""
    e = torch.exp(scores - scores.max(dim=-1, keepdim=True).values.detach())
    return e / e.sum(dim=-1, keepdim=True)


def swiglu(v, gate_up, down):
    hidden = gate_up.shape[0] // 2
    gate, up = v @ gate_up[:hidden].T, v @ gate_up[hidden:].T
    return (gate / (1 + torch.exp(-gate)) * up) @ down.T


def rotate(v, positions, theta, scaling):
    """Rotate-half RoPE of one head (T, E): channel i turns with channel i + E/2 by position * theta^(-2i/E)."""
    half = v.shape[-1] // 2
    angles = [[p / (scaling or 1.0) * theta ** (-i / half) for i in range(half)] for p in positions]
    cos, sin = (torch.tensor([[f(a) for a in row] for row in angles], dtype=v.dtype) for f in (math.cos, math.sin))
    a, b = v[:, :half], v[:, half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Twin:
    """One model: `config` is a dict of TRMConfig's values, `weights` a state dict."""

    def __init__(self, config, weights):
        self.c, self.w = config, weights

    def attention(self, v, name, positions, visible):
        c, w = self.c, self.w
        heads, kv_heads, size = c["n_heads"], c["n_kv_heads"], c["d_model"] // c["n_heads"]
        qkv = w[name + "qkv.weight"]
        outs = []
        for head in range(heads):
            kv = head // (heads // kv_heads)  # consecutive query heads share one key/value head
            q = v @ qkv[head * size : (head + 1) * size].T
            k = v @ qkv[(heads + kv) * size : (heads + kv + 1) * size].T
            value = v @ qkv[(heads + kv_heads + kv) * size : (heads + kv_heads + kv + 1) * size].T
            if c["qk_norm"]:
                q = rms_norm(q, w.get(name + "q_norm.weight"), c["norm_eps"])
                k = rms_norm(k, w.get(name + "k_norm.weight"), c["norm_eps"])
            if c["positions"] == "rope":
                q = rotate(q, positions, c["rope_theta"], c["rope_scaling"])
                k = rotate(k, positions, c["rope_theta"], c["rope_scaling"])
            scores = (q @ k.T / math.sqrt(size)).masked_fill(~visible, -math.inf)
            out = softmax(scores) @ value
            if c["attention_gate"]:
                out = out * (2 / (1 + torch.exp(-(v @ w[name + "head_gate.weight"][head]))))[:, None]
            outs.append(out)
        return torch.cat(outs, dim=-1) @ w[name + "out.weight"].T

    def block(self, h, name, positions, visible):
        c, w, eps = self.c, self.w, self.c["norm_eps"]

        def mix(v):
            if c["mixer"] == "mlp":
                mlp = name + "attn.mlp."
                return swiglu(v.T, w[mlp + "gate_up.weight"], w[mlp + "down.weight"]).T
            return self.attention(v, name + "attn.", positions, visible)

        def feed(v):
            return swiglu(v, w[name + "mlp.gate_up.weight"], w[name + "mlp.down.weight"])

        for part, sublayer in (("attn", mix), ("mlp", feed)):
            inner = w.get(f"{name}{part}_norm.weight")
            if c["norm"] == "post":
                if part == "attn" and c["mixer"] == "mlp":  # over the positions, channel by channel
                    h = rms_norm((h + sublayer(h)).T, inner, eps).T
                else:
                    h = rms_norm(h + sublayer(h), inner, eps)
                continue
            out = sublayer(rms_norm(h, inner, eps))
            if c["norm"] == "sandwich":
                out = rms_norm(out, w.get(f"{name}{part}_out_norm.weight"), eps)
            h = h + out
        return h

    def inject(self, target, inputs):
        """What the blocks read when the stream `target`, y or z, is updated from these inputs."""
        if self.c["injection"] == "concat":
            return torch.cat(inputs, dim=-1) @ self.w[f"net.inject_{target}.weight"].T
        return sum(inputs[1:], inputs[0])

    def net(self, target, inputs, old, positions, visible):
        """TinyNet: inject the inputs, n_layers blocks, final norm (pre, sandwich), gate against the `old` stream."""
        c, w = self.c, self.w
        h = inputs[0] if c["recursion"] == "none" else self.inject(target, inputs)
        for layer in range(c["n_layers"]):
            h = self.block(h, f"net.blocks.{layer}.", positions, visible)
        if c["norm"] != "post":
            h = rms_norm(h, w.get("net.norm.weight"), c["norm_eps"])
        if c["gate"] and c["recursion"] != "none":
            opening = torch.sigmoid(torch.cat((old, h), dim=-1) @ w["net.gate.weight"].T + w["net.gate.bias"])
            h = old + opening * (h - old)
        return h

    def embedded(self, token, position):
        c, w = self.c, self.w
        x = w["embed.weight"][token] * self.scale()
        return (x + w["pos_embed.weight"][position] if c["positions"] == "learned" else x)[None]

    def scale(self):
        c = self.c
        is_small = c["tie_embeddings"] and c["recursion"] != "none" or c["weight_init"] == "truncated"
        return math.sqrt(c["d_model"]) if is_small else 1.0

    def prefix(self, puzzle, positions):
        """The prefix of one row (P, D): the numbers of a puzzle's embedding one after the other, then zeros."""
        c, w = self.c, self.w
        numbers = w["puzzle_embed.weight"][puzzle] * self.scale()
        rows = []
        for token in range(c["prefix_tokens"]):
            part = numbers[token * c["d_model"] : (token + 1) * c["d_model"]]
            row = torch.cat((part, torch.zeros(c["d_model"] - len(part), dtype=part.dtype)))
            rows.append(row + w["pos_embed.weight"][positions[token]] if c["positions"] == "learned" else row)
        return torch.stack(rows)

    def enter(self, ids, segments, puzzle=0):
        """One row: x (P + T, D), its positions (a list) and what each position sees (P + T, P + T)."""
        c = self.c
        segments = [1] * c["prefix_tokens"] + list(segments)
        length = len(segments)
        positions, real = [], 0
        for segment in segments:
            real += segment != 0
            positions.append(max(real - 1, 0))
        visible = torch.zeros(length, length, dtype=torch.bool)
        for i in range(length):
            for j in range(length):
                past = j <= i or not c["causal"]
                past = past and (c["attention_window"] is None or abs(i - j) < c["attention_window"])
                visible[i, j] = i == j or (past and segments[j] != 0 and segments[i] == segments[j])
        own = positions[c["prefix_tokens"] :]
        x = torch.cat([self.embedded(token, position) for token, position in zip(ids, own, strict=True)])
        if c["prefix_tokens"]:
            x = torch.cat((self.prefix(puzzle, positions), x))
        for layer in range(c["prelude_layers"]):
            x = self.block(x, f"prelude.{layer}.", positions, visible)
        return x, positions, visible

    def initial(self, x):
        c, w = self.c, self.w
        if c["recursion"] == "trm":
            ones = torch.ones(x.shape[0], 1, dtype=x.dtype)
            return ones * w["y_init"], ones * w["z_init"]
        return (x if c["injection"] == "none" else torch.zeros_like(x)), None

    def recursion_step(self, step, x, y, z, positions, visible):
        """y and z after a supervision step of trm, a visit of the loop, or the plain transformer's only visit."""
        c = self.c
        if c["recursion"] == "none":
            return self.net("y", (x,), None, positions, visible), None
        frozen = c["deep_steps"] - c["grad_deep_steps"]
        if c["recursion"] == "loop":
            y = self.net("y", (y,) if c["injection"] == "none" else (x, y), y, positions, visible)
            return (y.detach() if step % c["deep_steps"] < frozen else y), None
        for t in range(c["deep_steps"]):
            for _ in range(c["latent_steps"]):
                z = self.net("z", (x, y, z), z, positions, visible)
            y = self.net("y", (y, z), y, positions, visible)
            if t < frozen:
                y, z = y.detach(), z.detach()
        return y, z

    def read_out(self, y, positions, visible):
        """logits (T, V) and halting logits (T,), or one (1,) at position 0 where the model is not causal."""
        c, w = self.c, self.w
        h = y
        for layer in range(c["coda_layers"]):
            h = self.block(h, f"coda.{layer}.", positions, visible)
        if c["coda_layers"] and c["norm"] != "post":
            h = rms_norm(h, w.get("coda_norm.weight"), c["norm_eps"])
        logits = h[c["prefix_tokens"] :] @ w["embed.weight" if c["tie_embeddings"] else "head.weight"].T
        if not c["halting"]:
            return logits, None
        halt = (y @ w["q_head.weight"].T + w["q_head.bias"])[:, 0]
        return logits, halt if c["causal"] else halt[:1]

    def forward(self, ids, targets=None, segments=None, steps=None, carry=None, puzzles=None):
        """ids, targets, segments: lists of rows of ints.  A dict of loss, ce, act (None without targets), logits and
        halt (one entry per recursion step, each (B, T, V) and (B, T) or (B,)), carry."""
        c = self.c
        steps = steps or (c["supervision_steps"] if c["recursion"] == "trm" else 1)
        each = c["deep_steps"] if c["recursion"] == "loop" else 1
        segments = segments or [[1] * len(row) for row in ids]
        puzzles = puzzles or [0] * len(ids)
        rows = [self.enter(*row) for row in zip(ids, segments, puzzles, strict=True)]
        states, done = carry or ([self.initial(x) for x, _, _ in rows], 0)
        logits, halts, ces, acts = [], [], [], []
        for s in range(done * each, (done + steps) * each):
            before = states
            states = [self.recursion_step(s, x, *state, *view) for (x, *view), state in zip(rows, states, strict=True)]
            read = [self.read_out(y, *view) for (_, *view), (y, _) in zip(rows, states, strict=True)]
            logits.append(torch.stack([row for row, _ in read]))
            halts.append(None if read[0][1] is None else torch.stack([h for _, h in read]).reshape(len(ids), -1))
            if targets is not None:
                previous = [self.read_out(y, *view) for (_, *view), (y, _) in zip(rows, before, strict=True)]
                ces.append(self.token_loss(logits[-1], targets))
                acts.append(self.act_loss(read, previous, targets, s))
            if not c["full_bptt"] and (s + 1) % each == 0:
                states = [(y.detach(), None if z is None else z.detach()) for y, z in states]
        out = {"logits": logits, "halt": halts, "carry": (states, done + steps), "loss": None, "ce": None, "act": None}
        if targets is not None:
            weights = self.weights((done + steps) * each)[done * each :]
            out["ce"] = sum(w * ce for w, ce in zip(weights, ces, strict=True)) / sum(weights)
            out["act"] = sum(w * act for w, act in zip(weights, acts, strict=True)) / sum(weights)
            out["loss"] = out["ce"] + c["act_weight"] * out["act"]
        return out

    def weights(self, steps):
        """Of the losses after recursion steps 0..steps-1; the loop has none at visits without gradient."""
        c = self.c
        weights = supervision_weights(
            c["supervision_weights"] or ("last" if c["recursion"] == "loop" else "equal"), steps
        )
        if c["recursion"] == "loop":
            frozen = c["deep_steps"] - c["grad_deep_steps"]
            weights = [0.0 if t % c["deep_steps"] < frozen else w for t, w in enumerate(weights)]
        return weights

    def token_loss(self, logits, targets):
        """Mean over target tokens, or over the rows that have any of their means."""
        probabilities = stablemax if self.c["token_loss"] == "stablemax" else softmax
        if self.c["loss_mean"] == "token":
            return cross_entropy(logits, targets, probabilities)
        rows = [(row, goals) for row, goals in zip(logits, targets, strict=True) if any(t != IGNORE for t in goals)]
        return sum(cross_entropy(row[None], [goals], probabilities) for row, goals in rows) / max(1, len(rows))

    def act_loss(self, read, previous, targets, step):
        """Mean halting cross-entropy: of tokens, or, where the model is not causal, of rows, which halt as a whole.

        With loss_mean `token`, each target counts the same; with `row`, each row that has any."""
        stable = self.c["act_target"] == "stable"
        by_row = []  # (mean of a row, its number of targets)
        if self.c["halting"] and not (stable and step == 0):
            for (logits, halt), (old_logits, old_halt), row in zip(read, previous, targets, strict=True):
                hits = {}
                for t, target in enumerate(row):
                    if target != IGNORE:
                        hits[t] = int(logits[t].argmax()) == (int(old_logits[t].argmax()) if stable else target)
                h = old_halt if stable else halt
                if hits and self.c["causal"]:
                    losses = [binary_cross_entropy(h[t], hit) for t, hit in hits.items()]
                    by_row.append((sum(losses) / len(losses), len(hits)))
                elif hits:
                    by_row.append((binary_cross_entropy(h[0], all(hits.values())), len(hits)))
        if not by_row:
            return torch.zeros((), dtype=read[0][0].dtype)
        counts = [n if self.c["loss_mean"] == "token" else 1 for _, n in by_row]
        return sum(n * loss for (loss, _), n in zip(by_row, counts, strict=True)) / sum(counts)


class TokenTwin(Twin):
    """Adaptive depth, one token after the other: at each layer and phase of its recursion step s a token sees of every
    earlier token what that one showed there at the same step, or at its last if it had stopped before."""

    def __init__(self, config, weights):
        super().__init__(config, weights)
        self.shown = {}  # (layer, phase) -> for every token, for every step that it took: (keys, values) of its heads

    def attention(self, v, name, positions, visible):
        c, w = self.c, self.w
        heads, kv_heads, size = c["n_heads"], c["n_kv_heads"], c["d_model"] // c["n_heads"]
        parts = (v @ w[name + "qkv.weight"].T)[0].reshape(-1, size)
        q, k, value = parts[:heads], parts[heads : heads + kv_heads], parts[heads + kv_heads :]
        if c["qk_norm"]:
            q = rms_norm(q, w.get(name + "q_norm.weight"), c["norm_eps"])
            k = rms_norm(k, w.get(name + "k_norm.weight"), c["norm_eps"])
        if c["positions"] == "rope":
            q = torch.cat([rotate(row[None], positions, c["rope_theta"], c["rope_scaling"]) for row in q])
            k = torch.cat([rotate(row[None], positions, c["rope_theta"], c["rope_scaling"]) for row in k])
        shown = self.shown.setdefault((name, self.phase), [])
        if len(shown) == self.token:
            shown.append([])
        shown[self.token].append((k, value))
        first = max(0, self.token + 1 - (c["attention_window"] or len(shown)))
        seen = [steps[min(self.step, len(steps) - 1)] for steps in shown[first:]]
        outs = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = torch.stack([q[head] @ keys[kv] for keys, _ in seen]) / math.sqrt(size)
            out = softmax(scores) @ torch.stack([values[kv] for _, values in seen])
            if c["attention_gate"]:
                out = out * (2 / (1 + torch.exp(-(v[0] @ w[name + "head_gate.weight"][head]))))
            outs.append(out)
        return torch.cat(outs)[None] @ w[name + "out.weight"].T

    def token_step(self, x, y, z):
        c, at = self.c, [self.token]
        if c["recursion"] == "loop":
            self.phase = 0
            return self.net("y", (y,) if c["injection"] == "none" else (x, y), y, at, None), None
        for t in range(c["deep_steps"]):
            for i in range(c["latent_steps"]):
                self.phase = (t, i)
                z = self.net("z", (x, y, z), z, at, None)
            self.phase = (t, "y")
            y = self.net("y", (y, z), y, at, None)
        return y, z

    def think(self, ids, depth, leaves):
        """One row of ints: logits (T, V) of every token's last step, and the steps each took.  `leaves(logits, halting
        logit, logits of the step before or None)` says whether a token stops."""
        rows, depths = [], []
        for self.token, token in enumerate(ids):
            self.step, self.phase, before = 0, "prelude", None
            x = self.embedded(token, self.token)
            for layer in range(self.c["prelude_layers"]):
                x = self.block(x, f"prelude.{layer}.", [self.token], None)
            y, z = self.initial(x)
            for self.step in range(depth):
                y, z = self.token_step(x, y, z)
                self.phase = "coda"
                logits, halt = self.read_out(y, [self.token], None)
                if leaves(logits[0], None if halt is None else halt[0], before):
                    break
                before = logits[0]
            rows.append(logits[0])
            depths.append(self.step + 1)
        return torch.stack(rows), depths


def binary_cross_entropy(logit, is_true):
    p = 1 / (1 + torch.exp(-logit))
    return -torch.log(p if is_true else 1 - p)


def stablemax(scores):
    """Over the last dimension: x + 1 where x >= 0 and 1 / (1 - x) below, over their sum."""
    s = torch.where(scores >= 0, scores + 1, 1 / (1 - scores.clamp(max=0)))
    return s / s.sum(dim=-1, keepdim=True)


def cross_entropy(logits, targets, probabilities=softmax):
    """Mean over target tokens of -log of the target's probability, token by token, nats."""
    terms = []
    for row, row_targets in zip(logits, targets, strict=True):
        for scores, target in zip(row, row_targets, strict=True):
            if target != IGNORE:
                terms.append(-torch.log(probabilities(scores)[target]))
    return sum(terms) / len(terms) if terms else logits.sum() * 0


def supervision_weights(spec, steps):
    if spec in ("equal", "linear", "last"):
        return [{"equal": 1.0, "linear": s + 1.0, "last": float(s == steps - 1)}[spec] for s in range(steps)]
    numbers = [float(number) for number in spec.split(",")]
    return [numbers[min(s, len(numbers) - 1)] for s in range(steps)]


def llama_with_weights_of(model):
    """The plain family's other twin: transformers' LlamaForCausalLM with the same weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len, tie_word_embeddings=c.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    ours, theirs = model.state_dict(), {}
    theirs["model.embed_tokens.weight"], theirs["lm_head.weight"] = ours["embed.weight"], ours["head.weight"]
    theirs["model.norm.weight"] = ours["net.norm.weight"]
    names = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {"attn.out": "self_attn.o_proj", "mlp.down": "mlp.down_proj"}
    for layer in range(c.n_layers):
        a, b = f"net.blocks.{layer}.", f"model.layers.{layer}."
        theirs |= {f"{b}{new}.weight": ours[f"{a}{old}.weight"] for old, new in names.items()}
        q, k, v = ours[a + "attn.qkv.weight"].split([c.head_dim * n for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])
        gate, up = ours[a + "mlp.gate_up.weight"].chunk(2)
        theirs |= {f"{b}self_attn.{part}_proj.weight": w for part, w in (("q", q), ("k", k), ("v", v))}
        theirs |= {f"{b}mlp.gate_proj.weight": gate, f"{b}mlp.up_proj.weight": up}
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(theirs)
    return llama
