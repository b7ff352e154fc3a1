"""Turns dataclasses into command-line flags and YAML settings, and user mistakes into one-line errors.

A --config file overrides the defaults of the dataclasses, and flags override the file.
"""

import collections
import copy
import dataclasses
import difflib
import io
import json
import math
import os
import re
import signal
import sys
import typing

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, _loaders_dumpers, set_parsing_settings

from src.errors import ADVICE, UserError, one_line
from src.files.folders import holds_model
from src.files.plain_yaml import PlainLoader, read_yaml
from src.files.text import is_text, same_file_key

_loaders_dumpers.yaml_default_loader = PlainLoader  # jsonargparse's own loader crashes on deeply nested flag values
set_parsing_settings(import_path_denylist=["*"])  # settings must not import code; `parse_flags` allows its sections


def run(main):
    """Run a script's main() and exit with the code that it returns.

    A UserError is printed as one line on stderr and exits with code 2. Ctrl-C exits with code 130."""
    sys.exit(_guarded(main))


def before_torch(parse_args):
    """Decorates the parse_args of a script that imports torch after its definition.

    If the script is run (not imported), the decorator parses the command line immediately. So --help and the message
    for a wrong flag appear at once, and not after the import of torch, which takes seconds."""
    if parse_args.__module__ != "__main__":
        return parse_args
    parsed = _guarded(parse_args)
    if sys.stderr.isatty():
        print("loading torch", file=sys.stderr)
    return lambda argv=None: parsed if argv is None else parse_args(argv)


def _guarded(function):
    """Call function() and return its result.  A mistake of the user is printed as one line and ends the program."""
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
    except BrokenPipeError:  # the reader of stdout has closed it (`| head`), which is not a mistake
        _drop_stdout()
        sys.exit(0)
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        print(f"error: {one_line(error)}: {ADVICE[error.errno]}", file=sys.stderr)
        _drop_stdout()
        sys.exit(2)


def _check_folder():
    try:
        os.getcwd()
    except FileNotFoundError:  # checked here, because libraries fail later with a traceback
        raise UserError("the current folder was deleted: change to a folder that exists") from None


class _Messages(io.FileIO):
    """stderr that drops a message if it cannot be written (disk full, reader gone), so that the work continues."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _prepare_streams():
    """Make the standard streams UTF-8 in any locale, and replace closed ones (`>&-`) by /dev/null.

    The streams of a notebook cannot be reconfigured and stay as they are."""
    if sys.stderr is not None and sys.stderr is sys.__stderr__:
        file = io.BufferedWriter(_Messages(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(file, encoding="utf-8", line_buffering=True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # opening it now also takes the closed file descriptor, so no later file can get number 1 or 2
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may have bytes that are not UTF-8
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _drop_stdout():
    """Discard what is still buffered for stdout: Python flushes it at exit, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def flag_value(argv, name: str) -> str | None:
    """Returns the last value of the flag `--name` among words that are not parsed yet, or None."""
    words = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    places = [i for i, word in enumerate(words[:-1]) if word == f"--{name}"]
    return words[places[-1] + 1] if places else None


def write_text(path, text: str, mode: str = "w"):
    """Write text to a file as UTF-8, with escapes for what is not UTF-8.  Raises UserError if it cannot be written."""
    try:
        with open(path, mode, encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; correct the path, or free disk space") from None


def write_json(path, found: dict):
    """Write figures as JSON.  Raises UserError if the file cannot be written."""
    found = json.loads(json.dumps(found), parse_constant=lambda name: None)  # JSON has no NaN: write null
    write_text(path, json.dumps(found, indent=1) + "\n")


def check_writable(path):
    """Raises UserError if a file cannot be written.  Call it before long work, to fail early."""
    if os.fspath(path).lower().endswith(".gz"):
        raise UserError(f"{path}: the file is not compressed: leave out .gz")
    is_new = not os.path.exists(path)
    write_text(path, "", "a")
    if is_new:
        os.unlink(os.path.realpath(path))  # the file that was made, not a link to it


def check_distinct(outputs, inputs):
    """Raises UserError if a file to write is also a file to read, or would be written twice.  None means no file."""
    taken = {_key(path) for path in inputs if path is not None}
    for path in outputs:
        if path is not None and (os.path.isfile(path) or not os.path.exists(path)):  # devices may be used twice
            if _key(path) in taken:
                raise UserError(f"{path} is also read, or written by another flag: choose another file to write")
            taken.add(_key(path))


def check_png(name: str, path: str | None):
    """Raises ValueError if a picture of this setting would have a name that does not end in .png."""
    if path is not None and not path.endswith(".png"):
        raise ValueError(f"{name} is {path}: choose a file name that ends in .png")


def _key(path):
    return same_file_key(path) if os.path.exists(path) else os.path.realpath(path)


class _Parser(ArgumentParser):
    """jsonargparse's parser with its error messages rewritten as one plain line."""

    file = None  # the --config file that is being parsed, for error messages

    def error(self, message, ex=None):
        if not self.exit_on_error:  # a nested parser for one item of a section; the outer parser adds the location
            super().error(message, ex)
        where = f"--config {self.file}: " if self.file else ""
        print(f"error: {where}{self._plainly(one_line(message))} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def _plainly(self, message):
        """Rewrite jsonargparse's message about a wrong value as "--flag value: expected type"."""
        if imports := re.match(r'Parser key "([\w.]+)": .*Importing .* is not allowed', message):
            return f"--{imports[1]}: this is not a section: settings are plain values and import nothing"
        item = re.match(r'Parser key "([\w.]+)": Problem with given class_path \S+ (.*)$', message)
        if item:
            return f"{item[1]}: {self._plainly(item[2]).removeprefix('--')}"
        wrong = re.match(r'Parser key "([\w.]+)": .*(?:Given|Got) value: (.*?)(?: Subclass types .*)?$', message)
        if not wrong:
            return re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)
        action = next((a for a in self._actions if a.dest == wrong[1]), None)
        if action is not None and hasattr(action, "_typehint"):
            allowed = str(action._typehint)
        else:  # a field inside a section's item has no action here, so the type is taken from the message
            types = re.search(r"Subtypes: \[(.*?)\]|Expected an? (<.*?>)", message)
            allowed = (types[1] or types[2]) if types else "another type"
        allowed = re.sub(r"typing\.Literal|<class '([\w.]+)'>", lambda m: m[1] or "one of ", allowed)
        return f"--{wrong[1]} {wrong[2]}: expected {allowed}"


def parse_flags(description, *classes, argv=None, positional=None, defaults=None):
    """Parse flags and --config files into instances of the dataclasses `classes`, and return them in that order.

    Each field becomes a flag with the field's name, unless it has init=False. Its help text is its line under `Args:`
    in the class docstring. A list takes one or more values; [] is an empty list of numbers. A bool takes `--x`, `--x
    true` or `--x false`; a `bool | str` takes `--x word` too. `description` is the text at the top of --help, usually
    the script's docstring. `positional` names the field that takes the words without a flag. `defaults(parsed)` may
    return {name: value} to replace defaults of the classes. Raises UserError if a dataclass rejects its values. A wrong
    flag ends the program with one line and exit code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(description=description, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of settings named like the flags below; flags override it")
    for cls in classes:
        parser.add_class_arguments(cls, as_group=True)
    fields = {name: field for cls in classes for name, field in _flags(cls)}
    sections = {kind for field in fields.values() for kind in (field.type, *typing.get_args(field.type))}
    sections = [f"{kind.__module__}.{kind.__qualname__}" for kind in sections if dataclasses.is_dataclass(kind)]
    set_parsing_settings(import_path_allowlist=sections)
    files, words = _normalise(argv, fields, positional)
    from_files = _parse_files(parser, files, fields)
    rest = [word for word in words if word not in ("-h", "--help")]
    parsed = _expand(parser.parse_args(rest, from_files), fields)
    others = defaults(parsed) if defaults is not None else {}
    if others or rest != words:  # --help would show the defaults of the classes
        parser.set_defaults(others | (from_files.as_dict() if from_files is not None else {}))
        parsed = _expand(parser.parse_args(words, from_files), fields)
    try:
        return tuple(build(cls, {f.name: parsed[f.name] for f in dataclasses.fields(cls) if f.init}) for cls in classes)
    except UserError as error:
        raise UserError(f"{error} (settings from flags and {', '.join(files)})" if files else error) from None


def _expand(parsed, fields):
    """Replace ~/ by the home folder, which the shell does not do in a YAML file or in --flag=~/x.

    Values that are text rather than paths (prompts, suffixes, field names) stay as they are."""
    for name in (name for name in fields if name.split("_")[-1] not in ("prompt", "suffix", "field", "board")):
        value = parsed.get(name)
        if isinstance(value, list):
            parsed[name] = [os.path.expanduser(v) if str(v).startswith("~/") else v for v in value]
        elif str(value).startswith("~/"):
            parsed[name] = os.path.expanduser(value)
    return parsed


def _parse_files(parser, files, fields):
    """Returns the settings of the --config files; a later file overrides an earlier one."""
    parsed = None
    for parser.file in files:
        values = read_yaml(parser.file, "--config")
        if unknown := [name for name in values if name not in fields]:
            raise UserError(f"--config {parser.file}: {_unknown(unknown[0], fields)}")
        parsed = parser.parse_object(values, parsed, defaults=False, env=False)
    parser.file = None
    return parsed


def _unknown(name, fields, flag=""):
    """Returns the message for an unknown setting, with the closest known name.  flag: "--" or empty."""
    close = difflib.get_close_matches(name, fields, 1)
    return f"there is no setting {flag}{name}" + (f": did you mean {flag}{close[0]}?" if close else ": see --help")


def build(cls, values, where=""):
    """Returns cls(**values), with nested sections built as well.  `where` is a prefix of error messages.

    Raises UserError if a setting is unknown, null, not finite or of the wrong type, or if cls raises a ValueError."""
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - kinds.keys()):
        raise UserError(f"{where}there is no setting {unknown[0]}: correct its name, or leave it out")
    try:
        return cls(**{name: _checked(kinds[name], value, where + name) for name, value in values.items()})
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}{error}") from None


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "nothing"}


def _checked(kind, value, where):
    """Returns a field's value converted to the field's type `kind`: 16.0 to the int 16, dicts to dataclasses.

    Raises UserError if the value does not fit the type. `where` names the setting in that message."""
    kinds = typing.get_args(kind) or (kind,)
    if value is None and type(None) not in kinds and not dataclasses.is_dataclass(kind):
        raise UserError(f"{where} is left empty (null): give it a value")
    if value == "" and type(None) in kinds:  # often an unset shell variable, as in --cache_dir "$CACHE"
        raise UserError(f"{where} is empty: give it a value, or leave it out")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{where} contains a NUL character: remove it")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}: give it a finite number")
    if typing.get_origin(kind) is not list and all(each in KINDS for each in kinds) and type(value) not in kinds:
        if int in kinds and type(value) is float and value.is_integer():
            return int(value)
        if float in kinds and type(value) is int:
            return float(value)
        raise UserError(f"{where} is {value!r}: give it {' or '.join(KINDS[each] for each in kinds)}")
    if typing.get_origin(kind) is list and isinstance(value, list):
        is_section = dataclasses.is_dataclass(kinds[0])
        return [_checked(kinds[0], item, f"{where}[{i}]" if is_section else where) for i, item in enumerate(value)]
    if not dataclasses.is_dataclass(kind) or isinstance(value, kind):
        return value
    if not isinstance(value, (dict, Namespace, type(None))):
        raise UserError(f"{where} is {value!r}: this is a section: give its settings instead")
    return build(kind, dict(value or {}), f"{where}: ")


def literal_fields(cls) -> dict:
    """Returns {field name: allowed values} for the Literal fields of a dataclass."""
    return {
        f.name: typing.get_args(f.type) for f in dataclasses.fields(cls) if typing.get_origin(f.type) is typing.Literal
    }


class _Formatter(DefaultHelpFormatter):
    def add_argument(self, action):  # leaves out what jsonargparse adds to a flag but `_normalise` refuses
        if not action.dest.endswith(".help"):
            action = copy.copy(action)
            action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
            super().add_argument(action)

    def _fill_text(self, text, width, indent):  # argparse would re-wrap the example commands of the description
        return "".join(f"{indent}{line}\n" for line in text.strip().splitlines())


def _flags(cls, start=""):
    """Yields (flag name, field) for every field; fields of a nested dataclass are named `section.field`."""
    for field in (field for field in dataclasses.fields(cls) if field.init):
        yield start + field.name, field
        if dataclasses.is_dataclass(field.type):
            yield from _flags(field.type, f"{start}{field.name}.")


def _is_list(field):
    """Whether the flag takes several words: a list, or a list or None. A list of dataclasses is given as JSON."""
    kinds = [kind for kind in (field.type, *typing.get_args(field.type)) if typing.get_origin(kind) is list]
    return any(not dataclasses.is_dataclass(typing.get_args(kind)[0]) for kind in kinds)


def _normalise(argv, fields, positional):
    """Rewrite the command line into the form that jsonargparse parses.  Returns (--config files, rewritten words).

    `--flag` becomes `--flag=true`, and `--paths a b` becomes `--paths=["a", "b"]`. Words without a flag become the
    value of the positional field."""
    out, free, files, lists = [], [], [], []
    words = collections.deque(argv)
    while words:
        word = words.popleft()
        name, is_assigned, value = word.partition("=")
        field = fields.get(name[2:]) if name.startswith("--") else None
        if field is None and name != "--config":
            if name.startswith("--") and name != "--help":
                raise UserError(_unknown(name[2:], fields, "--"))
            is_free = positional and not name.startswith("-")
            (free if is_free else out).append(word)
        elif field is not None and _is_list(field):
            values = [value] if is_assigned else []
            while words and not words[0].startswith("--"):
                values.append(words.popleft())
            if not values:
                raise UserError(f"{name} needs one or more values")
            if positional == "checkpoint" and not free and len(values) > 1 and holds_model(values[-1]):
                raise UserError(f"{name} takes all words after it, also {values[-1]}: write the checkpoint before it")
            # as text, [] may be a prompt
            is_empty = values == ["[]"] and list[str] not in (field.type, *typing.get_args(field.type))
            lists.append(name[2:])
            out.append(_list_flag(name[2:], [] if is_empty else values))
        elif field is not None and field.type in (bool, bool | None, bool | str) and not is_assigned:
            following = words[0] if words else "--"
            is_word = field.type == bool | str and (following[:1] != "-" or following == "-")
            has_value = is_word or following.lower() in ("true", "false", "yes", "no")
            out.append(f"{name}={words.popleft() if has_value else 'true'}")
        else:  # the value is the next word, even if it looks like a flag
            if not is_assigned:
                value = words.popleft() if words else None
            if field is not None:
                out.append(name if value is None else f"{name}={value}")
            elif value:
                files.append(value)
            else:
                raise UserError("--config needs the path of a YAML file")
    if free and not _is_list(fields[positional]):
        out.append(f"--{positional}={free.pop(0)}")
        if free:
            advice = "quote values that contain spaces" + "; did you mean --prompt?" * ("prompt" in fields)
            raise UserError(f"unexpected word {free[0]!r}: {positional} is a single path; {advice}")
    elif free:
        if positional in lists:
            raise UserError(f"--{positional} is given twice, with the flag and without it: give all of its values once")
        out.append(_list_flag(positional, free))
    for name in {name for name in lists if lists.count(name) > 1}:
        print(f"--{name} is given twice: only the last one counts", file=sys.stderr)
    return files, out


def _list_flag(name, values):
    if not is_text("".join(values)):
        raise UserError(f"--{name}: a value is not valid UTF-8: correct it, or set PYTHONUTF8=1 if it is right")
    return f"--{name}={json.dumps(values, ensure_ascii=False)}"
