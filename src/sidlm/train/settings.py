"""Dotted settings of nested config dataclasses: from YAML and from the command line, with errors that name the key.

A setting is [key, value, ...] with values as text; YAML and command line go through the same conversion, so both take
the same values and give the same errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from sidlm.errors import SidError

Config = TypeVar("Config")


class _Loader(yaml.SafeLoader):
    """YAML whose plain words with a colon are texts: version 1.1 has numbers to the base 60 and makes 124 of 2:4."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and ":" in value:
            implicit = (False, False)
        return super().resolve(kind, value, implicit)


def yaml_settings(cls: type, path: str | Path) -> list[list[str]]:
    """The settings of a YAML file. Raises SidError naming the file and the key."""
    return mapping_settings(cls, read_yaml(path, "config"), f"{path}: ")


def read_yaml(path: str | Path, what: str) -> dict[Any, Any]:
    """The mapping in a YAML file, which error messages call `what`. Raises SidError naming the file."""
    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # a safe one
    except OSError as error:
        raise SidError(f"cannot read {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SidError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict | None):
        raise SidError(f"{what} {path} must be a mapping of sections, got {type(loaded).__name__}")
    return loaded or {}


def mapping_settings(cls: type, values: dict[Any, Any], where: str) -> list[list[str]]:
    """The settings of nested sections. Raises SidError that begins with `where` and names the key."""
    return _walk(cls, values, "", keys_of(cls), where)


def _walk(cls: type, values: dict[Any, Any], prefix: str, keys: dict[str, Any], where: str) -> list[list[str]]:
    hints = typing.get_type_hints(cls)
    settings: list[list[str]] = []
    for name, value in values.items():
        key, hint = f"{prefix}{name}", hints.get(name)
        if hint is None:
            known = ["model.overrides" if k == "model.set" else k for k in keys]
            raise SidError(f"{where}unknown setting {key!r}{nearest(key, known)}")
        if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
            if not isinstance(value, dict | None):
                raise SidError(f"{where}{key} is a section and takes settings, got {value!r}")
        elif isinstance(value, dict):
            raise SidError(f"{where}{key}: expected {describe(hint)}, got a section")
        if dataclasses.is_dataclass(hint):
            settings += _walk(typing.cast(type, hint), value or {}, key + ".", keys, where)
        elif typing.get_origin(hint) is dict:
            settings.append([_cli_name(key), *format_overrides(value or {})])
        else:
            settings.append([key, *map(str, value if isinstance(value, list) else [value])])
    return settings


def _cli_name(key: str) -> str:
    return "model.set" if key == "model.overrides" else key


def keys_of(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted command-line key of a config class with its type."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        key = f"{prefix}{name}"
        keys |= (
            keys_of(typing.cast(type, hint), key + ".") if dataclasses.is_dataclass(hint) else {_cli_name(key): hint}
        )
    return keys


def argv_settings(cls: type, argv: Sequence[str]) -> list[list[str]]:
    """Split `--key value ...` and `--key=value` by key. Raises SidError for an unknown key."""
    keys = keys_of(cls)
    settings: list[list[str]] = []
    takes_more = False
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            if key not in keys:
                raise SidError(f"unknown setting '--{name}'{nearest(key, list(keys), '--')}")
            settings.append([key, *([value] if equals else [])])
            takes_more = not equals
        elif takes_more:
            settings[-1].append(word)
        else:
            raise SidError(f"unexpected argument {word!r}: settings look like --train.steps 100")
    return settings


def apply_settings(cfg: Config, settings: list[list[str]], where: str = "") -> Config:
    """`cfg` (a nested config dataclass) changed by settings [key, value, ...]. Raises SidError naming the key."""
    keys = keys_of(type(cfg))
    changes: dict[str, Any] = {}
    for key, *values in settings:
        try:
            changes[key] = convert(values, keys[key])
        except (ValueError, yaml.YAMLError) as error:
            got = " ".join(values) if values else "nothing"
            raise SidError(f"{where}{key}: expected {describe(keys[key])}, got {got!r}") from error
    try:
        return _replace(cfg, changes)
    except ValueError as error:  # a check of the dataclass itself
        raise SidError(f"{where}{error}") from error


def _replace(cfg: Any, changes: dict[str, Any]) -> Any:
    """Dotted changes applied to nested dataclasses, each section once, so that its checks see all of them."""
    sections: dict[str, dict[str, Any]] = {}
    new: dict[str, Any] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            sections.setdefault(head, {})[rest] = value
        elif isinstance(value, dict):  # model.set adds to what is there
            new["overrides"] = {**cfg.overrides, **value}
        else:
            new[head] = value
    new |= {head: _replace(getattr(cfg, head), inner) for head, inner in sections.items()}
    return dataclasses.replace(cfg, **new)


def convert(values: Sequence[str], hint: Any) -> Any:
    """Words as a value of type `hint`. Raises ValueError where they are not one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return parse_overrides(list(values))
    if origin is tuple:
        return tuple(convert([value], args[0]) for value in values)
    if hint is bool and not values:  # a bare switch
        return True
    if len(values) != 1:
        raise ValueError(f"expected one value, got {len(values)}")
    word = values[0]
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and word.lower() in ("null", "none", "~"):
            return None
        return convert(values, next(a for a in args if a is not type(None)))
    if hint is bool:
        return {"true": True, "false": False}[word.lower()] if word.lower() in ("true", "false") else _refuse(word)
    if origin is Literal:
        return args[[str(a) for a in args].index(word)]
    return hint(word)


def _refuse(word: str) -> Any:
    raise ValueError(word)


def print_help(cfg: Any, prog: str) -> None:
    """Every setting with its meaning and its value in `cfg`, to stdout."""
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        tyro.cli(
            type(cfg),
            prog=prog,
            description=type(cfg).__doc__,
            args=["--help"],
            default=cfg,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    print(help_text.getvalue().rstrip())


def nearest(key: str, known: Sequence[str], prefix: str = "") -> str:
    """A hint "; did you mean 'x'?" with the nearest known key, of the same last part or by the whole key; else ""."""
    last = key.rpartition(".")[2]
    exact = [k for k in known if k.rpartition(".")[2] == last]
    by_whole = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    by_last = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in known], n=1, cutoff=0.6)
    found = exact or by_whole or [k for k in known if k.rpartition(".")[2] in by_last]
    return f"; did you mean {prefix + found[0]!r}?" if found else ""


def describe(hint: Any) -> str:
    """A type in words: "a whole number", "one of on, off", ..."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin in (tuple, list):
        return "any number of values, each " + describe(args[0])
    if origin is dict:
        return "NAME=VALUE ..."
    return getattr(hint, "__name__", str(hint))


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """["num_hidden_layers=6", "simplicial_window=[64,8]"] -> {"num_hidden_layers": 6, ...}; values are YAML."""
    overrides = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"expected NAME=VALUE, got {item!r}")
        overrides[key.strip()] = yaml.load(value, _Loader)
    return overrides


def format_overrides(overrides: dict[str, Any]) -> list[str]:
    return [f"{key}={_flow(value)}" for key, value in overrides.items()]


def _flow(value: Any) -> str:
    """One-line YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")
