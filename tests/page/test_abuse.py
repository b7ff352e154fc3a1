"""Many malformed requests, made from the published document: never a status of 500, and the server still answers.

`make test-slow` sends 10,000; the fast test some."""

import copy
import json
import random

import pytest
from test_server import client_of, complete, new_service

JUNK = [
    None,
    True,
    0,
    -1,
    1,
    1.5,
    2**31,
    2**63,
    -(2**70),
    1e308,
    1e-320,
    "",
    "a",
    "é\u0000\u202e",
    "\ud800",
    "x" * 70_000,
]
JUNK += [[], {}, [[]], [None], ["a", 1], [[1], "a"], {"": 0}, {"a": {"a": {}}}, [0] * 3000, "NaN", "halt", [1.0, 2.0]]
KEYS = [
    "",
    "prompt",
    "promt",
    "n",
    "recursion",
    "depth",
    "__class__",
    "\u0000",
    "messages",
    "x" * 2000,
    "stream",
    "\ud800",
]
HEADERS = [
    {},
    {"Content-Type": "text/plain"},
    {"Content-Type": "\u00ff"},
    {"Accept": "x"},
    {"Content-Encoding": "gzip"},
]
HEADERS += [{"Host": "x"}, {"Origin": "x"}, {"Authorization": "\u00e9"}, {"Transfer-Encoding": "x"}, {"Expect": "x"}]


def example(schema: dict, rng: random.Random):
    """Returns a random value that fits a schema."""
    if "anyOf" in schema:
        return example(rng.choice(schema["anyOf"]), rng)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema["type"] if isinstance(schema["type"], str) else rng.choice(schema["type"])
    if kind == "object":
        names = [n for n in schema["properties"] if n in schema["required"] or rng.random() < 0.4]
        return {name: example(schema["properties"][name], rng) for name in names}
    if kind == "array":
        size = rng.randint(schema.get("minItems", 0), min(4, schema["maxItems"]))
        return [example(schema["items"], rng) for _ in range(size)]
    if kind == "string":
        return "".join(rng.choice("ab \n→é") for _ in range(rng.randint(schema.get("minLength", 0), 12)))
    if kind in ("integer", "number"):
        low, high = schema["minimum"], min(schema["maximum"], 3)
        return rng.randint(int(low), int(high)) if kind == "integer" else rng.uniform(low, high)
    return rng.random() < 0.5 if kind == "boolean" else None


def places(value, path=()):
    """Yields the path of every value inside a JSON value, and of the value itself."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def spoil(body, rng):
    """Returns a body with a random value replaced, removed or added."""
    path = rng.choice(list(places(body)))
    if not path:
        return copy.deepcopy(rng.choice(JUNK))
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    change = rng.random()
    if change < 0.2:
        del inner[path[-1]]
    elif change < 0.35 and isinstance(inner, dict):
        inner[rng.choice(KEYS)] = copy.deepcopy(rng.choice(JUNK))
    else:
        inner[path[-1]] = copy.deepcopy(rng.choice(JUNK))
    return body


def damage(data: bytes, rng) -> bytes:
    """Returns bytes with a random part cut out, replaced or repeated."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.randrange(8))
    return data[:start] + rng.choice([b"", b"\x00", b"\xff", b"[" * 2000, b'"', b"}", data]) + data[end:]


def send_many(number: int, seed: int):
    """Sends so many requests, most of them malformed, and checks every answer."""
    rng, service = random.Random(seed), new_service(max_tokens=3, max_seconds=20, max_queue=40, max_body_kib=64)
    statuses = {}
    with client_of(service, raise_server_exceptions=False) as client:
        paths = client.get("/openapi.json").json()["paths"]
        bodies = {path: what["post"]["requestBody"] for path, what in paths.items() if "post" in what}
        for _ in range(number):
            path = rng.choice(list(bodies))
            body = example(bodies[path]["content"]["application/json"]["schema"], rng)
            for name in ("model", "suffix"):  # most values are refused, so leave them out of most bodies
                if rng.random() < 0.9:
                    body.pop(name, None)
            for _ in range(rng.choice([0, 1, 1, 2])):
                body = spoil(body, rng) if isinstance(body, (dict, list)) and body else copy.deepcopy(rng.choice(JUNK))
            data = json.dumps(body).encode()
            data = damage(data, rng) if rng.random() < 0.15 else data
            method = rng.choice(["POST"] * 20 + ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
            headers = {name: value.encode() for name, value in rng.choice([{}] * 20 + HEADERS).items()}
            where = rng.choice([path] * 30 + [path + "/", "/static/../config.py", "/static/%2e%2e/app.py", "/v1/%00"])
            answer = client.request(method, where, content=data, headers=headers)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500 or answer.status_code == 503, (method, where, data[:300], answer.text)
            assert "Traceback" not in answer.text and "import" not in answer.text
            if answer.status_code >= 400 and method != "HEAD":
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
        assert complete(client, prompt="a", max_tokens=1)["usage"]["completion_tokens"] == 1
        assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    assert service.engine.n_rows == 0 and statuses[200] > number / 50 and statuses[400] > number / 5, statuses


def test_malformed_requests(capsys):
    send_many(60, seed=0)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_ten_thousand_malformed_requests(capsys):
    send_many(10_000, seed=1)
    assert "Traceback" not in capsys.readouterr().err
