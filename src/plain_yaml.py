"""YAML of settings: plain scalars, lists and maps, and nothing that makes objects or grows.

The parser is PyYAML's; values are made here, as its own loader takes a key that stands twice, follows aliases
("billion laughs"), crashes on deep nesting, and has YAML 1.1's surprises (1e-3 is text, 1:30 is 90).
"""

import math
import re

import yaml

from src.errors import UserError, one_line
from src.files import MOST_DEPTH, read_text

MOST_CHARS = 8 * 1024**2  # of settings, where a list of a hundred thousand paths has room
_WORDS = {"": None, "~": None, "null": None}
_WORDS |= dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
_WORDS |= {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,4000})")  # Python refuses to read longer ones
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)(e[-+]?[0-9]+)?", re.IGNORECASE)


def read_yaml(path, what: str = "") -> dict:
    """The map of a YAML file of settings, {} for an empty one; see `parse_yaml`.

    UserError, which begins with `what` (a flag), where it cannot be read or is no map."""
    where = f"{what} {path}".strip()
    values = parse_yaml(read_text(path, what), where)
    if not isinstance(values, dict | None):
        raise UserError(f"{where} holds no settings: write lines of `name: value`")
    return values or {}


def parse_yaml(text: str, where):
    """The value of a YAML text, None where it holds none.

    UserError, which names `where`, where it is broken, or has what settings do not need: tags, anchors, a second
    document, a key twice, over MOST_DEPTH levels, over MOST_CHARS."""
    if len(text) > MOST_CHARS:
        raise UserError(f"{where} holds over {MOST_CHARS:,} characters: these are no settings")
    values = []
    try:
        events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                values.append(_value(next(events), events, where, 0))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: lone surrogates
        raise UserError(f"{where} is no YAML: {one_line(error)}") from None
    if len(values) > 1:
        raise UserError(f"{where} holds {len(values)} documents (lines of ---): settings are one")
    return values[0] if values else None


def _value(event, events, where, depth):
    """The value that begins with `event`; takes from `events` what belongs to it."""
    where_now = f"{where}, line {event.start_mark.line + 1}"
    if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
        raise UserError(f"{where_now}: tags (!), anchors (&), aliases (*) are not for settings: write the value itself")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event.value) if event.implicit[0] else event.value
    if depth == MOST_DEPTH:
        raise UserError(f"{where_now}: lists and maps nest over {MOST_DEPTH} deep: these are no settings")
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(item, events, where, depth + 1) for item in _until(yaml.SequenceEndEvent, events)]
    values, lines = {}, {}
    for key in _until(yaml.MappingEndEvent, events):
        if not isinstance(key, yaml.ScalarEvent) or key.tag or key.anchor:
            raise UserError(f"{where_now}: a setting's name must be a plain word")
        name, line = key.value, key.start_mark.line + 1
        if name in ("class_path", "init_args"):  # which jsonargparse would import
            raise UserError(f"{where}, line {line}: {name}: settings are plain values and import nothing")
        if name in lines:
            raise UserError(f"{where}, line {line}: {name} is set already in line {lines[name]}: keep one of the two")
        values[name], lines[name] = _value(next(events), events, where, depth + 1), line
    return values


def _until(end, events):
    """The events up to the one of kind `end`; who takes one takes what belongs to it, too."""
    while not isinstance(event := next(events), end):
        yield event


def _scalar(word: str):
    """The value of a word without quotes. Unlike in YAML 1.1, 1e-3 is a number; dates, 1:30 and 010 are text."""
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if _INT.fullmatch(word):
        return int(word.replace("_", ""))
    is_float = _FLOAT.fullmatch(word) and not word.lstrip("+-").isdigit()
    return float(word.replace("_", "")) if is_float else word


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that `_scalar` would take for something else, or that has line breaks of any kind."""

    def represent_str(self, text):
        is_plain = _scalar(text) == text and text.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def dump_yaml(values) -> str:
    """A nest of lists, maps and plain values as YAML that `parse_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
