"""Reading and printing a configuration: YAML files, key=value arguments, --help, --print-config.

A value is read by the declared type of its key, never by YAML's guess: YAML 1.1 takes 1e-4 for text, no for False and
1:30 for 90. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from parallax.config import Config, check, keys, kind_name, resolve_batch, schedule_names, sections, value_fits
from parallax.config_hf import disagreements, model_keys, read_hf_config
from parallax.config_names import did_you_mean, unknown_key, value_hint
from parallax.errors import ConfigError, report

__all__ = ["from_dict", "help_text", "load", "parse_command_line", "to_dict", "to_yaml", "with_overrides"]

FORM = "write key=value, as in model.layers=4 or config=FILE.yaml"
BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_command_line(argv: Sequence[str] | None = None) -> Config:
    """`load` for a program: argv defaults to the process's arguments.

    --help (-h) and --print-config print and exit with 0; a ConfigError is printed to stderr and exits with 2. Under a
    launcher all ranks do so, and only rank 0 prints. Raises SystemExit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    speaks = os.environ.get("RANK", "0") == "0"
    text = help_text() if "--help" in argv or "-h" in argv else None
    if text is None:
        try:
            config = load([argument for argument in argv if argument != "--print-config"])
        except ConfigError as error:
            report(error)
            raise SystemExit(2) from None
        if "--print-config" not in argv:
            return config
        text = to_yaml(config)
    if speaks:
        print(text, end="")
    raise SystemExit(0)


def load(argv: Sequence[str]) -> Config:
    """Read `config=FILE.yaml` and `key.path=value` arguments, in any order: defaults < file < command line. With
    init_from=DIRECTORY the model.* keys that are not given are those of the model there.

    Raises one ConfigError with every problem of the arguments, the file and `check`. Never exits.
    """
    reading = _Reading()
    files: list[str] = []
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not equals or not name.strip():
            reading.problems.append(_not_an_assignment(argument))
        elif name.strip() == "config":
            files.append(text)
        else:
            reading.add(name.strip(), text, "the command line", f"{name.strip()}={text}")
    if len(files) > 1:
        reading.problems.append(f"config is given {len(files)} times ({', '.join(files)}); give one file")
    given, reading.values = reading.values, {}
    for path in files[:1]:
        _read_file(path, reading)
    values = reading.values | given
    hf = _read_hf(values.get("init_from"), reading)
    config = _replaced(Config(), {**model_keys(hf), **values} if hf else values)
    if hf:
        reading.problems += disagreements(config, hf)
    problems = reading.problems + check(config, unread=reading.unread)
    if len(problems) > 1:
        numbered = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ConfigError(f"{len(problems)} problems in the configuration:{numbered}")
    if problems:
        raise ConfigError(problems[0])
    return config


def _read_hf(directory: object, reading: _Reading) -> dict[str, Any] | None:
    """The config.json of the model to begin from, if there is one; what is wrong with it goes to the problems."""
    if not isinstance(directory, str) or directory == "none":
        return None
    try:
        hf = read_hf_config(Path(directory))
        model_keys(hf, f"init_from={directory}")
    except ConfigError as error:
        reading.problems.append(str(error))
        return None
    return hf


def with_overrides(config: Config, overrides: Mapping[str, object]) -> Config:
    """The configuration with some keys replaced: {"model.layers": 4}. Text is read as on the command line.

    Raises ConfigError for an unknown key or a value of the wrong type. Rules between keys are left to `check`.
    """
    values: dict[str, object] = {}
    for name, raw in overrides.items():
        if name not in keys():
            raise ConfigError(unknown_key(name))
        try:
            values[name] = _convert(raw, keys()[name].kind)
        except ConfigError as error:
            raise ConfigError(f"{name}={raw}: {error}") from None
    return _replaced(config, values)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts that JSON can hold; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(saved: Mapping[str, Any]) -> Config:
    """The configuration that `to_dict` was given; what is left out has its default. Rules are left to `check`.

    Raises ConfigError for a key that is unknown or a value of the wrong type.
    """
    values: dict[str, object] = {}
    for name, value in saved.items():
        values |= {f"{name}.{leaf}": v for leaf, v in value.items()} if isinstance(value, dict) else {name: value}
    return with_overrides(Config(), values)


def to_yaml(config: Config) -> str:
    """The configuration as YAML with every key, which `load` reads back to an equal one.

    Raises ConfigError or MeshError if the mesh or the batch cannot be resolved.
    """
    lines = [f"# mesh {config.mesh_shape.describe()}", f"# batch {resolve_batch(config).equation}"]
    text = yaml.safe_dump(to_dict(config), sort_keys=False, width=float("inf"))
    return "\n".join(lines) + "\n" + text


def help_text(defaults: Mapping[str, str] | None = None) -> str:
    """Every key with its type, default and meaning, by section. defaults: what a program says of its own ones."""
    lines = ["usage: [config=FILE.yaml] [key=value ...] [--print-config] [--help]", ""]
    lines += [
        "Precedence: defaults < init_from's model < file < command line. A file may nest keys or write them dotted."
    ]
    section = None
    for name, known in keys().items():
        if (this := name.rpartition(".")[0]) != section:
            section = this
            lines += ["", f"{section}:" if section else "run:"]
        lines.append(f"  {name:<28} {known.help}")
        kind = "|".join((*schedule_names(), "auto")) if name == "pipeline.schedule" else kind_name(known.kind)
        lines.append(f"  {'':<28} {kind}, default {(defaults or {}).get(name) or _shown(known.default)}")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


@dataclass
class _Reading:
    """What was read so far, and everything that was wrong with it."""

    values: dict[str, object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    seen: dict[tuple[str, str], str] = field(default_factory=dict)

    def is_repeated(self, name: str, source: str, where: str) -> bool:
        """Report a key that the same source gave before."""
        if (name, source) in self.seen:
            first = self.seen[name, source]
            self.problems.append(f"{name} is given twice in {source}: {first} and {where}; keep one")
            return True
        self.seen[name, source] = where
        return False

    def add(self, name: str, raw: object, source: str, where: str) -> None:
        """Convert and keep one value, or report it. where: the argument, or the line of the file."""
        prefix = "" if source == "the command line" else f"{source}, {where}: "
        given = name
        if name == "precision" and isinstance(raw, str):  # a section, and a short name for the key that matters most
            name = "dtype"
        if name == "checkpoint.async":  # no name that Python lets a field have
            name = "checkpoint.background"
        if self.is_repeated(name, source, where):
            return
        if name not in keys():
            text = raw if isinstance(raw, str) else None
            self.problems.append(prefix + unknown_key(name, text, carry=not prefix))
            return
        try:
            self.values[name] = _convert(raw, keys()[name].kind)
        except ConfigError as error:
            self.unread.add(name)
            shown = raw if isinstance(raw, str) else "null" if raw is None else json.dumps(raw)
            hint = value_hint(given, raw, keys()[name]) if isinstance(raw, str) else ""
            self.problems.append(f"{prefix}{given}={shown}: {error}{hint}")


def _replaced(config: Config, values: Mapping[str, object]) -> Config:
    """Replace keys by their dotted names, which exist."""
    by_section: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        by_section.setdefault(section, {})[leaf] = value
    top = by_section.pop("", {})
    for section, leaves in by_section.items():
        top[section] = dataclasses.replace(getattr(config, section), **leaves)
    return dataclasses.replace(config, **top)


def _convert(raw: object, kind: Any) -> object:
    """A value of the declared type, from text, from a list of texts, or from a Python value that has it already."""
    args = typing.get_args(kind)
    if type(None) in args:
        if raw is None or isinstance(raw, str) and raw.strip().lower() in ("none", "null"):
            return None
        try:
            return _convert(raw, next(arg for arg in args if arg is not type(None)))
        except ConfigError as error:
            raise ConfigError(f"{error}, or none") from None
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(raw, kind)
    value = _parse(raw, kind) if isinstance(raw, str) else raw
    if kind is float and isinstance(value, int) and value_fits(value, float):
        value = float(value)
    if not value_fits(value, kind):
        raise ConfigError(f"expected {_expected(kind)}")
    return value


def _parse(text: str, kind: Any) -> object:
    """Text as a scalar of the declared type; text that is none comes back unchanged."""
    if kind is str or typing.get_origin(kind) is Literal:
        return text
    text = text.strip()
    if kind is bool:
        return BOOLS.get(text.lower(), text)
    if kind is int and not re.fullmatch(r"[+-]?[0-9_]+", text):
        return text
    try:
        return kind(text)
    except ValueError:
        return text


def _convert_tuple(raw: object, kind: Any) -> object:
    args = typing.get_args(kind)
    if isinstance(raw, str):
        match = re.fullmatch(r"\s*(?:\[(.*)\]|\((.*)\)|([^\[\]()]*))\s*", raw, re.DOTALL)
        inner = next((group for group in match.groups() if group is not None), "") if match else raw
        items: Sequence[object] = inner.removesuffix(",").split(",") if inner.strip() else []
    elif isinstance(raw, list | tuple):
        items = raw
    else:
        items = [raw]
    try:
        value = tuple(_convert(item.strip() if isinstance(item, str) else item, args[0]) for item in items)
    except ConfigError:
        value = ()
    if not value or not value_fits(value, kind):
        raise ConfigError(f"expected {_expected(kind)}")
    return value


def _expected(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if typing.get_origin(kind) is tuple:
        examples = {int: "integers, as in 3,5", str: "patterns, as in *embedding*,head.*"}
        return examples.get(typing.get_args(kind)[0], "two finite numbers, as in 0.9,0.95")
    return {int: "an integer", float: "a finite number", bool: "true or false"}.get(kind, "text")


def _not_an_assignment(argument: str) -> str:
    bare = argument.strip()
    if bare.endswith((".yaml", ".yml")):
        return f"argument {argument!r} has no key; did you mean config={bare}?"
    hint = did_you_mean(bare, None) if bare.startswith("-") or bare in keys() else ""
    return f"argument {argument!r} is not of the form key=value; {hint}{FORM}"


def _read_file(path: str, reading: _Reading) -> None:
    """Add what a YAML file says, or the reason why it cannot be read."""
    source = f"config={path}"
    try:
        root = yaml.compose(Path(path).read_bytes().decode("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        reading.problems.append(f"{source} cannot be read: {error.strerror}; give a YAML file")
    except UnicodeDecodeError as error:
        reading.problems.append(f"{source} is not UTF-8 text ({error.reason} at byte {error.start}); give a YAML file")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).replace(' in "<unicode string>",', "").split()) or type(error).__name__
        reading.problems.append(f"{source} is not valid YAML: {reason}")
    else:
        if root is None:
            return  # only comments: all defaults
        if not isinstance(root, yaml.MappingNode):
            reading.problems.append(f"{source} is not a mapping; write lines such as `steps: 100`")
            return
        _read_mapping(root, "", path, reading)


def _read_mapping(node: yaml.MappingNode, prefix: str, path: str, reading: _Reading) -> None:
    for key_node, value_node in node.value:
        where = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            reading.problems.append(f"{path}, {where}: a key is not plain text; write lines such as `steps: 100`")
            continue
        name = prefix + key_node.value
        raw = _plain(value_node)
        is_mapping = isinstance(value_node, yaml.MappingNode)
        # An unknown section is entered too, so that its keys get their own suggestions; a file that contains itself
        # through an anchor ends at the third level.
        if name in sections() or is_mapping and value_node.value and name not in keys() and name.count(".") < 2:
            if reading.is_repeated(name, path, where):
                continue
            if isinstance(value_node, yaml.MappingNode):
                _read_mapping(value_node, f"{name}.", path, reading)
            elif raw is not None:
                reading.problems.append(f"{path}, {where}: {unknown_key(name)}")
            continue
        reading.add(name, {} if is_mapping else raw, path, where)


def _plain(node: yaml.Node) -> object:
    """A scalar as its text, whatever YAML would make of it; null as None; a list as a list; the rest as {}."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [item.value if isinstance(item, yaml.ScalarNode) else {} for item in node.value]
    return {}
