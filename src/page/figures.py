"""GET /metrics: the engine's counts as Prometheus reads them."""

HELP = {
    "prompt_tokens": "tokens of prompts that were encoded",
    "new_tokens": "tokens that were written",
    "recursion_steps": "recursion steps of the written tokens",
    "model_calls": "calls of the model that wrote tokens",
    "cancelled": "texts whose client went away",
}


def prometheus(service) -> str:
    """Returns the text of /metrics."""
    engine = service.engine
    counts, lines = dict(engine.counts), []

    def add(name, kind, text, values):
        lines.extend((f"# HELP trm_{name} {text}", f"# TYPE trm_{name} {kind}"))
        lines.extend(f"trm_{name}{label} {value}" for label, value in values)

    for name, text in HELP.items():
        add(f"{name}_total", "counter", text, [("", counts.get(name, 0))])
    for name, label, text in (("ended", "reason", "texts that ended"), ("status", "code", "answers by status")):
        values = sorted((key.removeprefix(f"{name}_"), n) for key, n in counts.items() if key.startswith(f"{name}_"))
        add(f"{name}_total", "counter", text, [(f'{{{label}="{key}"}}', n) for key, n in values])
    add("running", "gauge", "texts that are being written", [("", engine.n_rows)])
    add("waiting", "gauge", "texts that wait", [("", len(engine.waiting))])
    return "\n".join(lines) + "\n"
