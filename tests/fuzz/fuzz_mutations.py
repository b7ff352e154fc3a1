"""The fuzzer's mutations of bytes, JSON, YAML and lines of text; fuzz_formats.py has those of other formats.

Each mutation takes (content, random.Random) and returns (content, must_refuse). must_refuse says why a reader must
refuse the content, or is "". A mutation depends on the random numbers alone, so every input can be made again.
"""

import copy
import gzip
import json
import struct

INTEGERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64)
ODD = (
    *INTEGERS,
    *(-n for n in INTEGERS[1:]),
    10**30,
    -3,
    16.0,
    16.5,
    1e308,
    float("nan"),
    float("inf"),
    -0.0,
    "false",
    "true",
    "",
    "x",
    "16",
    "a" * 100_000,
    "\0",
    "\ud800",
    "../../etc/passwd",
    "os.system",
    "fuzz_marker.x",
    [],
    {},
    [[]],
    [None],
    None,
    True,
    False,
    {"class_path": "fuzz_marker.x"},
    {"": 1},
    [1] * 10_000,
)
LONG_NUMBER, DEEP_LIST, DEEP_DICT = "\x01number", "\x01list", "\x01dict"  # placeholders: json.dumps cannot write these
RAW = {LONG_NUMBER: "9" * 5000, DEEP_LIST: "[" * 5000 + "]" * 5000, DEEP_DICT: '{"a":' * 5000 + "1" + "}" * 5000}


# ---- bytes ----------------------------------------------------------------------------------------------------------


def of_bytes(content: bytes, rng) -> tuple[bytes, str]:
    data, size = bytearray(content), len(content)
    at = rng.randrange(size + 1) if rng.random() < 0.5 else rng.randrange(min(size, 100) + 1)  # often in the header
    length = min(rng.choice((1, 2, 4, 8, 64, 1000)), size - at)
    action = rng.randrange(9)
    if action == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            if size:
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif action == 1:
        del data[at:]
    elif action == 2:
        del data[at : at + length]
    elif action == 3:
        data[at : at + length] = rng.randbytes(length)
    elif action == 4:
        data[at:at] = content[at : at + length] * rng.choice((1, 2, 100))
    elif action == 5:  # copy a part of it elsewhere
        to = rng.randrange(size + 1)
        data[to : to + length] = content[at : at + length]
    elif action == 6:
        form = rng.choice("<i >i <I <q <Q <H <f <d".split())
        number = rng.choice(INTEGERS) * rng.choice((1, 1, -1))
        limit = 2 ** (8 * struct.calcsize(form))
        is_float = form[1] in "fd"
        value = float(number) if is_float else number % limit - (limit // 2 if form[1] in "iq" else 0)
        data[at : at + struct.calcsize(form)] = struct.pack(form, value)
    elif action == 7:
        data[at : at + length] = bytes(length)
    else:
        data[at:at] = rng.choice((b"\xff", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\n", b'"', b"[" * 5000))
    return bytes(data), ""


# ---- JSON and YAML --------------------------------------------------------------------------------------------------


def places(value, path=()):
    """Yields the paths to all values in nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def of_nest(value, rng, odd):
    """Replaces, deletes, duplicates or moves one value in nested dicts and lists; `odd` makes replacements."""
    value = copy.deepcopy(value)
    paths = list(places(value))
    if not paths or rng.random() < 0.03:
        return odd(rng, value)
    depth = rng.choice(sorted({len(path) for path in paths}))  # else a long list would hide the few settings
    path = rng.choice([path for path in paths if len(path) == depth])
    parent, key = at(value, path[:-1]), path[-1]
    action = rng.randrange(10)
    if action == 0 and not isinstance(parent, tuple):
        del parent[key]
    elif action == 1:
        parent[key] = copy.deepcopy(at(value, rng.choice(paths)))
    elif action == 2 and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    elif action == 3 and isinstance(parent, list):
        parent.extend(parent[key : key + 1] * rng.choice((1, 3, 100)))
    else:
        parent[key] = odd(rng, parent[key])
    return value


def odd_value(rng, old):
    """Returns a number near the old one, or an unrelated value."""
    if isinstance(old, (int, float)) and not isinstance(old, bool) and rng.random() < 0.3:
        return rng.choice((old + 1, old - 1, old * 2, float(old), old + 0.5, str(old), -old))
    if rng.random() < 0.3:
        return rng.choice(INTEGERS)
    return rng.choice((*ODD, *RAW))


def of_json(content: bytes, rng) -> tuple[bytes, str]:
    value = json.loads(content)
    text = json.dumps(of_nest(value, rng, odd_value), indent=rng.choice((None, 1)))
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    encoding = rng.choice(["utf-8"] * 20 + ["utf-16", "utf-8-sig", "utf-32"])
    return text.encode(encoding), ""


YAML_LINES = (
    "seed: !!int x",
    "lr: .inf",
    "lr: .nan",
    "lr: !!python/object/apply:os.system ['true']",
    "<<: *a",
    "lr: [",
    "}",
    "curriculum: {class_path: fuzz_marker.x}",
    "monitoring: {class_path: fuzz_marker.Y, init_args: {a: 1}}",
    "? [a]: b",
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\nlr: *f",
    "lr: " + "[" * 5000,
    "lr: " + "{a: " * 3000,
    "a: " * 2,
    "lr: 1_0",
    "seed: 0x10",
    "seed: 1:30",
    "lr: 2001-01-01",
    "--- \nlr: 1",
    "lr: |\n  x",
    "%YAML 9.9",
    "lr: !!binary x",
    "lr: !!set {a}",
    "lr: !!timestamp x",
    "\tlr: 1",
    "lr:",
    "lr: !!float x",
    "lr: !fuzz_marker.x {}",
    "- 1",
    "3",
    "null",
    "lr: &x [*x]",
    "lr: 9" + "9" * 5000,
    "config: /etc/passwd",
    "__class__: x",
    "help: true",
    "print_config: true",
    "lr: 1\nlr: 2",
    "seed: ''",
    "d_model: 1e400",
)


def of_yaml(content: bytes, rng) -> tuple[bytes, str]:
    import yaml

    lines = content.decode().splitlines()
    if rng.random() < 0.5:
        line = rng.choice(YAML_LINES)
        key = rng.choice([part.partition(":")[0] for part in lines if part[:1].isalpha()] or ["lr"])
        lines.insert(rng.randrange(len(lines) + 1), line.replace("lr:", f"{key}:", 1))
        return "\n".join(lines).encode(), ""
    value = of_nest(yaml.safe_load(content), rng, odd_value)
    return yaml.dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"), ""


# ---- lines ----------------------------------------------------------------------------------------------------------

LINES = (
    b"",
    b"\xff\xfe",
    b"\0",
    b"{",
    b"[]",
    b"null",
    b'{"text": 1}',
    b'{"text": null}',
    b'{"text": "\\ud800"}',
    b"NaN",
    b"\r",
    b'{"text": "x", "label": 999999999}',
    b'{"text": "x", "label": [1]}',
    b'{"text": "x", "label": {"a": 1}}',
    b"<|endoftext|>",
    b'{"text": "x", "label": ' + b"9" * 5000 + b"}",
    b"9" * 5000 + b" ||| x",
    b"999999999 ||| x",
    b"999999999\tx",
    b"a" * 100_000,
    b"[" * 5000,
    b'{"a":' * 5000,
    "\u2028".encode(),
    "\x85".encode(),
    b"-1 ||| x",
    b"|||",
    b"\t",
    b"1e400 ||| x",
    "\u0661 ||| x".encode(),
    b'{"step": "x"}',
    b'{"step": 1, "lr": "x"}',
    b'{"step": 1e400, "loss": NaN}',
    b'{"step": 1, "loss": [1]}',
    b'{"step": true}',
    b'{"step": 1, "loss": ' + b"9" * 5000 + b"}",
    b'{"step": ' + b"9" * 400 + b', "loss": 1}',
    b'{"step": null}',
    b"\xef\xbb\xbf",
)


def of_lines(content: bytes, rng) -> tuple[bytes, str]:
    lines = content.split(b"\n")
    at, action = rng.randrange(len(lines)), rng.randrange(6)
    if action == 0:
        lines.insert(at, rng.choice(LINES))
    elif action == 1:
        lines[at] = rng.choice(LINES)
    elif action == 2:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif action == 3 and lines[at][:1] == b"{":
        lines[at] = of_json(lines[at], rng)[0]
    elif action == 4:
        return content.decode().encode(rng.choice(("utf-16", "utf-8-sig", "utf-32", "cp037"))), ""
    else:
        lines[at] = of_bytes(lines[at], rng)[0]
    return rng.choice((b"\n", b"\n", b"\r\n", b"\r")).join(lines), ""


def of_gzip(content: bytes, rng) -> tuple[bytes, str]:
    lines = gzip.decompress(content)
    if rng.random() < 0.01:
        return gzip.compress(lines) + gzip.compress(b" " * 4_000_000) * 100, ""  # a line of 400 MB
    return gzip.compress(of_lines(lines, rng)[0], 1), ""
