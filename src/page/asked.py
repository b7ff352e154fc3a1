"""From a checked request to the texts that the engine writes."""

import secrets
import time
from dataclasses import dataclass, field

from src.exits import max_depth
from src.model_config import THRESHOLDS, ExitRule
from src.page.engine import Text
from src.page.errors import ApiError
from src.page.writing import Writer
from src.sampling import row_generator

CHAT_STOP = "\nUser:"
ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


@dataclass(eq=False)
class Asked:
    """A request for texts: choice i of prompt p is texts[p * n + i]."""

    texts: list[Text]
    prompt_tokens: int
    is_chat: bool
    stream: bool
    include_usage: bool
    echo: bool
    logprobs: bool
    recursion: bool  # whether the answer has an object `recursion`
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))


def ask_completion(body: dict, model, tokenizer, bound: int = 10**6) -> Asked:
    """Returns what a body of /v1/completions asks for. Raises ApiError if the model cannot do it.

    bound: most new tokens of a text; a default above it is lowered"""
    suffix, prompts = body.get("suffix"), as_list(body["prompt"])
    if suffix is not None and body.get("echo"):
        raise ApiError(400, "echo and suffix exclude each other: leave out one of them", "suffix")
    if suffix is not None:
        rows, ends = around(tokenizer, prompts, suffix)
    else:
        # int: JSON may write a token id as 5.0
        rows = [list(map(int, p)) if isinstance(p, list) else tokenizer.encode(p, bos=True) for p in prompts]
        ends = tokenizer.end_ids
    most = min(16, bound) if body.get("max_tokens") is None else int(body["max_tokens"])
    asked = _ask(body, model, tokenizer, rows, ends, most, body.get("logprobs"), is_inside=suffix is not None)
    asked.id, asked.echo = f"cmpl-{secrets.token_hex(12)}", bool(body.get("echo"))
    if asked.echo:
        for text in asked.texts:
            text.scores_prompt = asked.logprobs
    elif most == 0:
        raise ApiError(400, "max_tokens is 0, which needs echo: set it to 1 or more", "max_tokens", "invalid_value")
    return asked


def ask_chat(body: dict, model, tokenizer, bound: int = 10**6) -> Asked:
    """Returns what a body of /v1/chat/completions asks for. Raises ApiError if the model cannot do it.

    bound: as in `ask_completion`"""
    most = body.get("max_completion_tokens")
    most = body.get("max_tokens") if most is None else most
    most = min(model.config.max_seq_len, bound) if most is None else int(most)
    if most == 0:
        raise ApiError(400, "max_tokens is 0: set it to 1 or more", "max_tokens", "invalid_value")
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs: set logprobs to true", "top_logprobs", "invalid_value")
    rows = [tokenizer.encode(chat_prompt(body["messages"]), bos=True)]
    logprobs = (body.get("top_logprobs") or 0) if body.get("logprobs") else None
    asked = _ask(body, model, tokenizer, rows, tokenizer.end_ids, most, logprobs, more_stops=(CHAT_STOP,))
    asked.id, asked.is_chat = f"chatcmpl-{secrets.token_hex(12)}", True
    return asked


def chat_prompt(messages: list[dict]) -> str:
    """Returns the text of a conversation: a line `User: ...` or `Assistant: ...` for each message, then `Assistant:`.

    The models of this project are not tuned for chats; this template only makes chat clients work."""
    lines = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        lines.append(f"{ROLES[message['role']]}: {content.strip()}\n")
    return "".join(lines) + "Assistant:"


def number_of_texts(body: dict) -> int:
    """Returns how many texts a request asks for."""
    return (len(as_list(body["prompt"])) if "prompt" in body else 1) * int(body.get("n") or 1)


def as_list(prompt) -> list:
    """Returns the prompts of a request, each a text or token ids."""
    is_one = isinstance(prompt, str) or not isinstance(prompt[0], (str, list))
    return [prompt] if is_one else prompt


def around(tokenizer, prompts, suffix):
    """Returns (the ids after which a model writes what is between each prompt and the suffix, the ids that end it)."""
    if tokenizer.fim is None:
        problem = "a suffix needs a model that was trained with --fim_rate, which this one was not: leave it out"
        raise ApiError(400, problem, "suffix", "unsupported_parameter")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ApiError(400, "with a suffix, the prompt must be a text, not token ids: give the text", "prompt")
    return [tokenizer.infill(prompt, suffix) for prompt in prompts], tokenizer.infill_ends


def read_rule(recursion: dict | None, model) -> ExitRule:
    """Returns the exit rule of a request. Raises ApiError if the model cannot follow it."""
    asked = {key: value for key, value in (recursion or {}).items() if value is not None}
    exit, threshold = asked.get("exit", "fixed"), asked.get("threshold")
    try:
        if exit == "fixed" and threshold is not None:
            raise ValueError("recursion.threshold belongs to an exit rule: set recursion.exit, or leave it out")
        depth = int(asked["depth"]) if "depth" in asked else None
        if depth == max_depth(model.config):
            depth = None  # the same rule, and so the same batch, as of requests that name no depth
        values = {} if threshold is None else {THRESHOLDS[exit]: float(threshold)}
        rule = ExitRule(exit, depth, **values).check(model.config)
    except ValueError as error:
        raise ApiError(400, f"recursion: {error}", "recursion", "invalid_value") from None
    return rule


def _ask(body, model, tokenizer, rows, ends, most, logprobs, is_inside=False, more_stops=()) -> Asked:
    context, recursion = model.config.max_seq_len, body.get("recursion")
    for number, ids in enumerate(rows):
        if len(ids) > context:
            where = f"prompt {number + 1}" if len(rows) > 1 else "the prompt"
            problem = f"{where} has {len(ids):,} tokens, the context holds {context:,}: shorten it"
            param = "messages" if "messages" in body else "prompt"
            raise ApiError(400, problem, param, "context_length_exceeded")
    rule, trace = read_rule(recursion, model), (recursion or {}).get("trace")
    stop, seed = body.get("stop") or (), body.get("seed")
    stops = (*((stop,) if isinstance(stop, str) else stop), *more_stops)
    choice = (
        1.0 if body.get("temperature") is None else float(body["temperature"]),
        None if body.get("top_k") is None else int(body["top_k"]),
        None if body.get("top_p") is None else float(body["top_p"]),
    )
    ends, n = () if body.get("ignore_eos") else tuple(ends), int(body.get("n") or 1)
    texts = []
    for ids in rows:
        own = secrets.randbits(31) if seed is None else int(seed)  # without a seed, equal prompts get different texts
        # with a suffix, the context must not move on, because the model would lose sight of the suffix
        longest = min(most, context + 1 - len(ids)) if is_inside else most
        for number in range(n):
            text = Text(list(ids), choice, row_generator(own, number), reads_steps=trace is not None, rule=rule)
            text.writer = Writer(tokenizer, ids, stops, ends, longest)
            text.logprobs = None if logprobs is None else int(logprobs)
            text.trace = None if trace is None else int(trace)
            text.wants_p = logprobs is not None or recursion is not None
            texts.append(text)
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    has = (logprobs is not None, recursion is not None)
    return Asked(texts, sum(map(len, rows)), False, bool(body.get("stream")), usage, False, *has)
