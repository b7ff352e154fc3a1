"""A safe subset of YAML for settings: plain scalars, lists and maps, without objects or aliases.

PyYAML parses the text, but this module builds the values. PyYAML's own loader accepts duplicate keys, expands aliases
("billion laughs"), crashes on deep nesting, and follows YAML 1.1's surprising rules (1e-3 is text, 1:30 is 90).
"""

import math
import re

import yaml

from src.errors import UserError, one_line
from src.files.text import MOST_DEPTH, read_text

MOST_CHARS = 8 * 1024**2  # limit for a settings file; it leaves room for a list of 100,000 paths
_WORDS = {"": None, "~": None, "null": None}
_WORDS |= dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
_WORDS |= {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,4000})")  # int() rejects more than 4,300 digits
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)(e[-+]?[0-9]+)?", re.IGNORECASE)


class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A loader class for `yaml.load`.

    Raises YAMLError for broken YAML, and for what settings do not need: tags, anchors, a second document, duplicate
    keys, more than MOST_DEPTH levels, more than MOST_CHARS characters."""

    def __init__(self, text: str):
        if len(text) > MOST_CHARS:
            raise yaml.YAMLError(f"it has over {MOST_CHARS:,} characters")
        try:
            super().__init__(text)
        except UnicodeError as error:  # lone surrogates
            raise yaml.YAMLError(error) from None

    def get_single_data(self):
        """Returns the value of the text, or None if it is empty."""
        starts = (e for e in self._until(yaml.StreamEndEvent) if isinstance(e, yaml.DocumentStartEvent))
        values = [self._value(self.get_event(), 0) for _ in starts]
        if len(values) > 1:
            raise yaml.YAMLError(f"it has {len(values)} documents (separated by ---): keep one")
        return values[0] if values else None

    def _value(self, event, depth):
        """Returns the value that starts with `event`, and consumes the parser events that belong to it."""
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            raise yaml.YAMLError(f"{line}: tags (!), anchors (&), aliases (*) are not allowed: write the value")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event.value) if event.implicit[0] else event.value  # implicit: without quotes
        if depth == MOST_DEPTH:
            raise yaml.YAMLError(f"{line}: lists and maps nest over {MOST_DEPTH} deep")
        if isinstance(event, yaml.SequenceStartEvent):
            return [self._value(item, depth + 1) for item in self._until(yaml.SequenceEndEvent)]
        values, lines = {}, {}
        for key in self._until(yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent) or key.tag or key.anchor:
                raise yaml.YAMLError(f"{line}: a setting's name must be a plain word")
            name, line = key.value, f"line {key.start_mark.line + 1}"
            if name in ("class_path", "init_args"):  # jsonargparse would import the class that they name
                raise yaml.YAMLError(f"{line}: {name} is not allowed: settings are plain values and import nothing")
            if name in lines:
                raise yaml.YAMLError(f"{line}: {name} is already set in {lines[name]}: keep one of the two")
            values[name], lines[name] = self._value(self.get_event(), depth + 1), line
        return values

    def _until(self, end):
        """Yields the events up to one of class `end`. The caller must consume the rest of each value it is given."""
        while not isinstance(event := self.get_event(), end):
            yield event


def read_yaml(path, what: str = "") -> dict:
    """Returns the settings in a YAML file as a dict, {} if it is empty; see `parse_yaml`.

    Raises UserError, which starts with `what` (a flag), if the file cannot be read or is not a map."""
    where = f"{what} {path}".strip()
    values = parse_yaml(read_text(path, what), where)
    if not isinstance(values, dict | None):
        raise UserError(f"{where} holds no settings: write lines of `name: value`")
    return values or {}


def parse_yaml(text: str, where):
    """Returns the value of a YAML text, None if it is empty. Raises UserError, which starts with `where`, for whatever
    `PlainLoader` rejects."""
    try:
        return yaml.load(text, PlainLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not a valid settings file: {one_line(error)}") from None


def _scalar(word: str):
    """Returns the value of a word without quotes. Unlike YAML 1.1, 1e-3 is a number; dates, 1:30 and 010 are text."""
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if _INT.fullmatch(word):
        return int(word.replace("_", ""))
    is_float = _FLOAT.fullmatch(word) and not word.lstrip("+-").isdigit()
    return float(word.replace("_", "")) if is_float else word


class _Dumper(yaml.SafeDumper):
    """Quotes a string if `_scalar` would not return it unchanged, or if it contains line breaks of any kind."""

    def represent_str(self, text):
        is_plain = _scalar(text) == text and text.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def dump_yaml(values) -> str:
    """Returns nested lists, maps and plain values as YAML that `parse_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
