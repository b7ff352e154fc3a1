"""Settings: dataclasses become flat flags and YAML keys.  Order: defaults < --config file < flags."""

import collections
import dataclasses
import difflib
import errno
import io
import json
import math
import os
import re
import signal
import sys
import typing

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, _loaders_dumpers, set_parsing_settings

from src.errors import UserError, one_line
from src.files.plain_yaml import PlainLoader, read_yaml

_loaders_dumpers.yaml_default_loader = PlainLoader  # of a flag's value: its own crashes on deep nesting
set_parsing_settings(import_path_denylist=["*"])  # besides the sections, see `parse_flags`


def run(main):
    """Run a script's main() and end with its exit code: a UserError is one line on stderr and 2, Ctrl-C is 130."""
    sys.exit(_guarded(main))


def before_torch(parse_args):
    """Decorator of a script's parse_args: where the script is what runs, the command line is read here and now, so that
    --help and a wrong flag are answered before the script goes on to import torch, which takes seconds."""
    if parse_args.__module__ != "__main__":
        return parse_args
    parsed = _guarded(parse_args)
    if sys.stderr.isatty():
        print("loading torch", file=sys.stderr)
    return lambda argv=None: parsed if argv is None else parse_args(argv)


def _guarded(function):
    """What a function of a script returns; mistakes of the user's are told in one line and end the program."""
    _prepare_streams()
    try:
        _check_folder()
        result = function()
        sys.stdout.flush()
        return result
    except UnicodeEncodeError:
        print("error: a flag's text is not valid UTF-8: correct it", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of stdout went away (`| head`): not a mistake
        _drop_stdout()
        sys.exit(0)
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        print(f"error: {one_line(error)}: {_ADVICE[error.errno]}", file=sys.stderr)
        _drop_stdout()
        sys.exit(2)


def _check_folder():
    try:
        os.getcwd()
    except FileNotFoundError:  # libraries die of it in ways of their own
        raise UserError("the folder that this shell is in was deleted: change to one that exists") from None


_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, and try again")
_ADVICE[errno.ENAMETOOLONG] = "choose a shorter name"


class _Messages(io.FileIO):
    """A file of messages: one that cannot be written (no room, nobody reads any more) is lost, and the work goes on."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _prepare_streams():
    """UTF-8, whatever the locale; a stream that was closed (`>&-`) is an empty one; a notebook's cannot change."""
    if sys.stderr is not None and sys.stderr is sys.__stderr__:
        file = io.BufferedWriter(_Messages(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(file, encoding="utf-8", line_buffering=True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (it takes the closed number)
    for stream, errors in ((sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _drop_stdout():
    """What is still to be written to stdout would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def write_text(path, text: str, mode: str = "w"):
    """Write a file of UTF-8 text.  UserError where it cannot be written."""
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room, or name another file") from None


def check_writable(path):
    """UserError where a file cannot be written: asked before long work, not after."""
    is_new = not os.path.exists(path)
    write_text(path, "", "a")
    if is_new:
        os.unlink(path)


class _Parser(ArgumentParser):
    file = None  # the --config file whose values are parsed

    def error(self, message, ex=None):
        if not self.exit_on_error:  # the parser of one item of a section: its parser says where it stands
            super().error(message, ex)
        where = f"--config {self.file}: " if self.file else ""
        print(f"error: {where}{self._plainly(one_line(message))} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def _plainly(self, message):
        """The parser's message about a wrong value as flag, value, what is allowed."""
        if imports := re.match(r'Parser key "([\w.]+)": .*Importing .* is not allowed', message):
            return f"--{imports[1]}: this is no section: settings are plain values and import nothing"
        item = re.match(r'Parser key "([\w.]+)": Problem with given class_path \S+ (.*)$', message)
        if item:
            return f"{item[1]}: {self._plainly(item[2]).removeprefix('--')}"
        wrong = re.match(r'Parser key "([\w.]+)": .*(?:Given|Got) value: (.*?)(?: Subclass types .*)?$', message)
        if not wrong:
            return re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)
        action = next((a for a in self._actions if a.dest == wrong[1]), None)
        told = re.search(r"Subtypes: \[(.*?)\]|Expected an? (<.*?>)", message)  # an item's field has no action here
        allowed = str(getattr(action, "_typehint", told and (told[1] or told[2]) or "another type"))
        allowed = re.sub(r"typing\.Literal|<class '([\w.]+)'>", lambda m: m[1] or "one of ", allowed)
        return f"--{wrong[1]} {wrong[2]}: expected {allowed}"


def parse_flags(description, *classes, argv=None, positional=None, defaults=None):
    """Flags and YAML into instances of the dataclasses `classes`, in their order.

    Every field is a flag of its own name; its help is its line under `Args:` in the class docstring. A list takes one
    or more values, a bool takes `--x`, `--x true` or `--x false`, a `bool | str` also `--x word`. `positional` names a
    field that needs no flag; `defaults(parsed)` gives {name: value} that replace defaults of the classes.
    Raises UserError where a dataclass refuses its values; a wrong flag ends the program with one line and code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(description=description, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of the same names as the flags below")
    for cls in classes:
        parser.add_class_arguments(cls, as_group=True)
    fields = {name: field for cls in classes for name, field in _flags(cls)}
    sections = {kind for field in fields.values() for kind in (field.type, *typing.get_args(field.type))}
    sections = [f"{kind.__module__}.{kind.__qualname__}" for kind in sections if dataclasses.is_dataclass(kind)]
    set_parsing_settings(import_path_allowlist=sections)
    files, words = _normalise(argv, fields, positional)
    from_files = _parse_files(parser, files, fields)
    parsed = _expand(parser.parse_args(words, from_files), fields)
    if defaults is not None and (others := defaults(parsed)):
        parser.set_defaults(others)
        parsed = _expand(parser.parse_args(words, from_files), fields)
    try:
        return tuple(build(cls, {f.name: parsed[f.name] for f in dataclasses.fields(cls)}) for cls in classes)
    except UserError as error:
        raise UserError(f"{error} (flags over --config {', '.join(files)})" if files else error) from None


def _expand(parsed, fields):
    """~/x of a YAML file, or of --flag=~/x, which shells leave as it is, is in the home folder; not so in a text."""
    for name in fields:
        if name.split("_")[-1] not in ("prompt", "suffix", "field") and str(parsed.get(name)).startswith("~/"):
            parsed[name] = os.path.expanduser(parsed[name])
    return parsed


def _parse_files(parser, files, fields):
    """What the --config files set, a later file over an earlier one."""
    parsed = None
    for parser.file in files:
        values = read_yaml(parser.file, "--config")
        if unknown := [name for name in values if name not in fields]:
            raise UserError(f"--config {parser.file}: {_unknown(unknown[0], fields)}")
        parsed = parser.parse_object(values, parsed, defaults=False, env=False)
    parser.file = None
    return parsed


def _unknown(name, fields, flag=""):
    close = difflib.get_close_matches(name, fields, 1)
    return f"there is no setting {flag}{name}" + (f": did you mean {flag}{close[0]}?" if close else ": see --help")


def build(cls, values, where=""):
    """cls(**values) and its sections.  UserError for a setting that is unknown, left empty, of another kind than its
    field, or not finite, and where the class itself refuses it by a ValueError."""
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - kinds.keys()):
        raise UserError(f"{where}there is no setting {unknown[0]}: correct its name, or leave it out")
    try:
        return cls(**{name: _checked(kinds[name], value, where + name) for name, value in values.items()})
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}{error}") from None


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "nothing"}


def _checked(kind, value, where):
    """A field's value, made into the dataclass (or the list of them) that its type asks for; 16.0 into the integer 16.

    UserError where it is of another kind than the field, for the plain kinds."""
    kinds = typing.get_args(kind) or (kind,)
    if value is None and type(None) not in kinds and not dataclasses.is_dataclass(kind):
        raise UserError(f"{where} is left empty (null): give it a value")
    if value == "" and type(None) in kinds:  # such as of a shell's variable that is not set
        raise UserError(f"{where} is empty: give it a value, or leave it out")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{where} holds a NUL character: correct it")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}: give it a finite number")
    if typing.get_origin(kind) is not list and all(each in KINDS for each in kinds) and type(value) not in kinds:
        if int in kinds and type(value) is float and value.is_integer():
            return int(value)
        if float in kinds and type(value) is int:
            return float(value)
        raise UserError(f"{where} is {value!r}: give it {' or '.join(KINDS[each] for each in kinds)}")
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [
            _checked(kinds[0], item, where + f"[{i}]" * dataclasses.is_dataclass(kinds[0]))
            for i, item in enumerate(value)
        ]
    if not dataclasses.is_dataclass(kind) or isinstance(value, kind):
        return value
    if not isinstance(value, (dict, Namespace, type(None))):
        raise UserError(f"{where} is {value!r}: it is a section, give it settings of its own")
    return build(kind, dict(value or {}), f"{where}: ")


def literal_fields(cls) -> dict:
    """{field name: allowed values} of a dataclass's Literal fields."""
    return {
        f.name: typing.get_args(f.type) for f in dataclasses.fields(cls) if typing.get_origin(f.type) is typing.Literal
    }


class _Formatter(DefaultHelpFormatter):
    def _fill_text(self, text, width, indent):  # keep a script's example commands as they are written
        return "".join(f"{indent}{line}\n" for line in text.strip().splitlines())


def _flags(cls, start=""):
    """(flag, field) of all fields; those of a section (a field that is a dataclass itself) are `section.field`."""
    for field in dataclasses.fields(cls):
        yield start + field.name, field
        if dataclasses.is_dataclass(field.type):
            yield from _flags(field.type, f"{start}{field.name}.")


def _is_list(field):
    """Whether the field takes a list of words; a list of sections is given as JSON."""
    return typing.get_origin(field.type) is list and not dataclasses.is_dataclass(typing.get_args(field.type)[0])


def _normalise(argv, fields, positional):
    """(files of --config, words): `--flag` -> `--flag=true`; `--paths a b` -> `--paths=["a", "b"]`; free words -> the
    positional field."""
    out, free, files, words = [], [], [], collections.deque(argv)
    while words:
        word = words.popleft()
        name, is_assigned, value = word.partition("=")
        field = fields.get(name[2:]) if name.startswith("--") else None
        if field is None and name != "--config":
            if name.startswith("--") and name != "--help":
                raise UserError(_unknown(name[2:], fields, "--"))
            (free if positional and not name.startswith("-") else out).append(word)
        elif field is not None and _is_list(field):
            values = [value] if is_assigned else []
            while words and not words[0].startswith("--"):
                values.append(words.popleft())
            if not values:
                raise UserError(f"{name} needs one or more values")
            out.append(_list_flag(name[2:], values))
        elif field is not None and field.type in (bool, bool | None, bool | str) and not is_assigned:
            following = words[0] if words else "-"
            is_word = field.type == bool | str and following[:1] != "-"
            has_value = is_word or following.lower() in ("true", "false", "yes", "no")
            out.append(f"{name}={words.popleft() if has_value else 'true'}")
        else:  # the value is the next word, whatever it looks like
            value = value if is_assigned else words.popleft() if words else None
            if field is not None:
                out.append(name if value is None else f"{name}={value}")
            elif value:
                files.append(value)
            else:
                raise UserError("--config needs the path of a YAML file")
    if free and not _is_list(fields[positional]):
        out.append(f"--{positional}={free.pop(0)}")
        if free:
            advice = "quote values with spaces" + "; did you mean --prompt?" * ("prompt" in fields)
            raise UserError(f"{free[0]!r} is one word too many: {positional} is a single path; {advice}")
    return files, out + ([_list_flag(positional, free)] if free else [])


def _list_flag(name, values):
    return f"--{name}={json.dumps(values, ensure_ascii=False)}"
