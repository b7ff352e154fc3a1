"""YAML of settings: plain scalars, lists and maps, and nothing that makes objects or grows.

The parser is PyYAML's; values are made here, as its own loader takes a key that stands twice, follows aliases
("billion laughs"), crashes on deep nesting, and has YAML 1.1's surprises (1e-3 is text, 1:30 is 90).
"""

import math
import re

import yaml

from src.errors import UserError, one_line
from src.files.text import MOST_DEPTH, read_text

MOST_CHARS = 8 * 1024**2  # of settings, where a list of a hundred thousand paths has room
_WORDS = {"": None, "~": None, "null": None}
_WORDS |= dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
_WORDS |= {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,4000})")  # Python refuses to read longer ones
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)(e[-+]?[0-9]+)?", re.IGNORECASE)


class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A loader as `yaml.load` takes one.  YAMLError for what is broken, and for what settings do not need: tags,
    anchors, a second document, a key twice, over MOST_DEPTH levels, over MOST_CHARS."""

    def __init__(self, text: str):
        if len(text) > MOST_CHARS:
            raise yaml.YAMLError(f"it holds over {MOST_CHARS:,} characters")
        try:
            super().__init__(text)
        except UnicodeError as error:  # lone surrogates
            raise yaml.YAMLError(error) from None

    def get_single_data(self):
        """The value of the text, None where it holds none."""
        starts = (e for e in self._until(yaml.StreamEndEvent) if isinstance(e, yaml.DocumentStartEvent))
        values = [self._value(self.get_event(), 0) for _ in starts]
        if len(values) > 1:
            raise yaml.YAMLError(f"it holds {len(values)} documents (lines of ---): settings are one")
        return values[0] if values else None

    def _value(self, event, depth):
        """The value that begins with `event`; takes from the parser what belongs to it."""
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            raise yaml.YAMLError(f"{line}: tags (!), anchors (&), aliases (*) are not for settings: write the value")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event.value) if event.implicit[0] else event.value
        if depth == MOST_DEPTH:
            raise yaml.YAMLError(f"{line}: lists and maps nest over {MOST_DEPTH} deep")
        if isinstance(event, yaml.SequenceStartEvent):
            return [self._value(item, depth + 1) for item in self._until(yaml.SequenceEndEvent)]
        values, lines = {}, {}
        for key in self._until(yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent) or key.tag or key.anchor:
                raise yaml.YAMLError(f"{line}: a setting's name must be a plain word")
            name, line = key.value, f"line {key.start_mark.line + 1}"
            if name in ("class_path", "init_args"):  # which jsonargparse would import
                raise yaml.YAMLError(f"{line}: {name}: settings are plain values and import nothing")
            if name in lines:
                raise yaml.YAMLError(f"{line}: {name} is set already in {lines[name]}: keep one of the two")
            values[name], lines[name] = self._value(self.get_event(), depth + 1), line
        return values

    def _until(self, end):
        """The events up to the one of kind `end`; who takes one takes what belongs to it, too."""
        while not isinstance(event := self.get_event(), end):
            yield event


def read_yaml(path, what: str = "") -> dict:
    """The map of a YAML file of settings, {} for an empty one; see `parse_yaml`.

    UserError, which begins with `what` (a flag), where it cannot be read or is no map."""
    where = f"{what} {path}".strip()
    values = parse_yaml(read_text(path, what), where)
    if not isinstance(values, dict | None):
        raise UserError(f"{where} holds no settings: write lines of `name: value`")
    return values or {}


def parse_yaml(text: str, where):
    """The value of a YAML text, None where it holds none.  UserError, which names `where`, as `PlainLoader`."""
    try:
        return yaml.load(text, PlainLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is no YAML of settings: {one_line(error)}") from None


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
