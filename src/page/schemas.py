"""What requests may contain, as JSON schemas: `validate` checks a body, and src/page/openapi.py publishes them."""

import difflib
import functools
import json
import re
from typing import Any, NamedTuple

from src.errors import one_line
from src.files.text import is_text
from src.page.errors import ApiError

MOST_DEPTH = 20  # nested lists and objects in a body
MOST_SEED = 2**63 - 1
MOST_LOGPROBS = 20
MOST_TRACE = 10
MOST_STOPS, MOST_STOP_CHARS = 16, 256
# settings of OpenAI's API that change nothing here: they are accepted at any value
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# settings that are not supported: only the value that changes nothing is accepted
NEUTRAL = {"best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}


class Bounds(NamedTuple):
    """The bounds of requests: settings of the server and of its model."""

    vocab_size: int
    context: int
    chars: int  # of a text
    prompts: int
    n: int
    tokens: int
    depth: int
    steps: int


def text(description, most, least=0):
    return {"type": "string", "maxLength": most, "minLength": least, "description": description}


def number(description, low, high, kind="number", default=None):
    schema = {"type": [kind, "null"], "minimum": low, "maximum": high, "description": description}
    return schema | ({} if default is None else {"default": default})


def flag(description):
    return {"type": ["boolean", "null"], "default": False, "description": description}


def closed(properties, required=(), description=""):
    """Returns the schema of an object that has these properties and no others."""
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | {"required": list(required)} | ({"description": description} if description else {})


def optional(schema):
    """Returns the schema of a value that may be null, or be left out."""
    return {"anyOf": [schema, {"type": "null"}]} | {k: schema[k] for k in ("description",) if k in schema}


def recursion_schema(b: Bounds):
    trace = f"0 to {MOST_TRACE}: trace each token: after every recursion step, this many likeliest tokens"
    properties = {
        "depth": number("most recursion steps per token; default as many as in training", 1, b.depth, "integer"),
        "exit": {"enum": [None, "halt", "kl"], "description": "rule by which tokens stop early; default: none"},
        "threshold": number("of the rule: halting probability, or nats; default that of the model", 0, 1e9),
        "trace": number(trace, 0, MOST_TRACE, "integer"),
    }
    return optional(closed(properties, description="how each token recurses; the answer then has it as well"))


def common_properties(b: Bounds):
    stop = text("a text at which the answer ends; it is not part of it", MOST_STOP_CHARS, 1)
    stops = {"type": "array", "items": stop, "maxItems": MOST_STOPS}
    usage = closed({"include_usage": flag("send a last chunk with usage")}, description="for stream")
    return {
        "model": {
            "type": ["string", "null"],
            "maxLength": 200,
            "description": "name of the model; default the one served",
        },
        "stream": flag("send the text while it is written, as server-sent events"),
        "stream_options": optional(usage),
        "stop": {"anyOf": [stop, stops, {"type": "null"}], "description": stop["description"]},
        "temperature": number("0 is greedy; higher values vary more", 0, 1e6, default=1),
        "top_p": number("choose among the likeliest tokens that together have this probability", 1e-9, 1, default=1),
        "top_k": number("choose among this many likeliest tokens", 1, b.vocab_size, "integer"),
        "seed": number("the same seed gives the same text; default: drawn", 0, MOST_SEED, "integer"),
        "n": number("texts for each prompt", 1, b.n, "integer", 1),
        "ignore_eos": flag("continue after the end-of-text token, up to max_tokens"),
        "recursion": recursion_schema(b),
    }


@functools.cache
def completion_schema(b: Bounds):
    """The body of POST /v1/completions."""
    one, token = text("a text to continue", b.chars), {"type": "integer", "minimum": 0, "maximum": b.vocab_size - 1}
    ids = {"type": "array", "items": token, "minItems": 1, "maxItems": b.context}
    several = ({"type": "array", "items": each, "minItems": 1, "maxItems": b.prompts} for each in (one, ids))
    prompt = {"anyOf": [one, ids, *several], "description": "a text, token ids, or a list of either"}
    properties = {
        "prompt": prompt,
        "suffix": optional(text("a text that follows: write what is between", b.chars)),
        "max_tokens": number("most new tokens of each text", 0, b.tokens, "integer", 16),
        "echo": flag("begin the text with the prompt"),
        "logprobs": number("log-probability of each token, and this many likeliest ones", 0, MOST_LOGPROBS, "integer"),
    }
    return closed(properties | common_properties(b), ["prompt"])


@functools.cache
def chat_schema(b: Bounds):
    """The body of POST /v1/chat/completions."""
    part = closed({"type": {"enum": ["text"]}, "text": text("", b.chars)}, ["type", "text"])
    content = {"anyOf": [text("", b.chars), {"type": "array", "items": part, "maxItems": 64}]}
    message = closed(
        {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": content,
            "name": optional(text("ignored", 200)),
        },
        ["role", "content"],
    )
    most = number("most new tokens of each text", 0, b.tokens, "integer")
    properties = {
        "messages": {"type": "array", "items": message, "minItems": 1, "maxItems": 256},
        "max_tokens": most,
        "max_completion_tokens": most,
        "logprobs": flag("the log-probability of each token"),
        "top_logprobs": number("with logprobs: this many likeliest tokens", 0, MOST_LOGPROBS, "integer"),
    }
    return closed(properties | common_properties(b), ["messages"])


@functools.cache
def tokenize_schema(b: Bounds):
    """The body of POST /v1/tokenize."""
    inside = flag("the text continues another one, so it gets no space before it, which some tokenizers add")
    return closed({"text": text("a text", b.chars), "inside": inside}, ["text"])


@functools.cache
def puzzle_schema(b: Bounds):
    """The body of POST /v1/puzzle."""
    properties = {
        "board": text("the symbols of the board, row by row", 10_000, 1),
        "steps": number("most supervision steps; default as many as in training", 1, b.steps, "integer"),
        "exit": {"enum": [None, "halt"], "description": "halt: end when the model says that its answer is right"},
    }
    return closed(properties, ["board"])


# ---- checking -------------------------------------------------------------------------------------------------------


def parse_body(data: bytes) -> Any:
    """Returns the JSON value of a body. Raises ApiError if it is broken, too deep, or has half a character."""
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, f"the body nests over {MOST_DEPTH} lists and objects: flatten it") from None
    except ValueError as error:  # also UnicodeDecodeError
        raise ApiError(400, f"the body is not JSON ({one_line(error)[:200]}): correct it") from None
    _check_inside(value, MOST_DEPTH)
    return value


def _no_constant(name):
    raise ValueError(f"{name} is no JSON number")


def _check_inside(value, left):
    if not left:
        raise ApiError(400, f"the body nests over {MOST_DEPTH} lists and objects: flatten it")
    if isinstance(value, dict) and not all(map(is_text, value)):
        raise ApiError(400, "a name has an escape for half a character, such as \\ud800: remove it")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(each, (dict, list)):
            _check_inside(each, left - 1)


def accepted(body: Any) -> dict:
    """Returns a body without the settings of OpenAI's API that change nothing. Raises ApiError for those that would."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {_kind(body)}, not a JSON object: send one")
    for name, neutral in NEUTRAL.items():
        if body.get(name) not in (None, neutral) and not (name == "best_of" and body[name] == body.get("n")):
            raise ApiError(400, f"{name} is not supported: leave it out", name, "unsupported_parameter")
    return {name: value for name, value in body.items() if name not in IGNORED and name not in NEUTRAL}


def validate(value: Any, schema: dict, name: str = ""):
    """Raises ApiError unless a JSON value fits a schema; knows only the keywords that this file uses."""
    if "anyOf" in schema:
        return _any_of(value, schema["anyOf"], name)
    if "enum" in schema:
        if not any(value is each or type(value) is type(each) and value == each for each in schema["enum"]):
            allowed = ", ".join(json.dumps(each) for each in schema["enum"])
            raise _wrong(name, f"is {_shown(value)}: choose one of {allowed}")
        return None
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(_is(value, kind) for kind in kinds):
        raise _wrong(name, f"is {_kind(value)}: give it {' or '.join(WORDS[kind] for kind in kinds if kind != 'null')}")
    if isinstance(value, str):
        _check_text(value, schema, name)
    elif isinstance(value, list):
        _check_size(len(value), schema.get("minItems", 0), schema.get("maxItems"), "items", name)
        for index, item in enumerate(value):
            validate(item, schema["items"], f"{name}[{index}]")
    elif isinstance(value, dict):
        _check_object(value, schema, name)
    elif not isinstance(value, (bool, type(None))) and "minimum" in schema:
        low, high = schema["minimum"], schema["maximum"]
        if not low <= value <= high:
            raise _wrong(name, f"is {_shown(value)}: set it from {low} to {high}")
    return None


WORDS = {
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _is(value, kind):
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {
        "string": isinstance(value, str),
        "integer": is_number and (isinstance(value, int) or value.is_integer()),
        "number": is_number,
        "boolean": isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
        "null": value is None,
    }[kind]


def _kind(value):
    return next(
        WORDS[kind]
        for kind in ("null", "boolean", "string", "integer", "number", "array", "object")
        if _is(value, kind)
    )


def _shown(value):
    shown = json.dumps(value)
    return shown if len(shown) <= 50 else f"{shown[:50]}..."


def _wrong(name, what):
    param = name.split("[")[0].split(".")[0] or None
    return ApiError(400, f"{name or 'the body'} {what}", param, "invalid_value")


def _any_of(value, schemas, name):
    """Checks a value against the alternatives of its type. Of several errors, the one furthest inside counts."""
    errors = []
    for schema in schemas:
        try:
            return validate(value, schema, name)
        except ApiError as error:
            kind = schema.get("type")
            errors.append((isinstance(kind, str) and _is(value, kind), error))
    fits = [error for is_kind, error in errors if is_kind]
    if fits:
        raise max(fits, key=lambda error: [int(i) for i in re.findall(r"\[(\d+)\]", error.message.split(" ")[0])])
    words = dict.fromkeys(WORDS[s["type"]] for s in schemas if isinstance(s.get("type"), str) and s["type"] != "null")
    raise _wrong(name, f"is {_kind(value)}: give it {' or '.join(words)}")


def _check_text(value, schema, name):
    if not is_text(value):
        raise _wrong(name, "has an escape for half a character, such as \\ud800: remove it")
    _check_size(len(value), schema.get("minLength", 0), schema.get("maxLength"), "characters", name)


def _check_size(size, least, most, what, name):
    if size < least:
        raise _wrong(name, f"has {size} {what}: give it {least} or more")
    if most is not None and size > most:
        raise _wrong(name, f"has {size:,} {what}: give it {most:,} or fewer")


def _check_object(value, schema, name):
    known = schema["properties"]
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(key[:100], known, 1)
            advice = f"did you mean {close[0]}?" if close else "leave it out"
            where = f"{name}.{key}" if name else key
            raise ApiError(400, f"there is no setting {where[:100]}: {advice}", where[:100], "unknown_parameter")
    for key in schema.get("required", ()):
        if key not in value:
            where = f"{name}.{key}" if name else key
            raise ApiError(400, f"{where} is missing: give it", where, "missing_required_parameter")
    for key, inner in value.items():
        validate(inner, known[key], f"{name}.{key}" if name else key)
