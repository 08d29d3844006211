"""Writes docs/config-reference.md from the config dataclasses: every key, its type, its default, what it means.

python tools/config_reference.py          write the file
python tools/config_reference.py --check  exit 1 if the committed file is not what would be written
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

import yaml

from sidlm.models import SidConfig
from sidlm.models.presets import PRESETS
from sidlm.train.extend import ExtendConfig
from sidlm.train.settings import describe

TARGET = Path(__file__).resolve().parents[1] / "docs" / "config-reference.md"

HEAD = """\
# Config reference

Written by `python tools/config_reference.py` from the dataclasses; do not edit.

A run is a YAML file whose sections are the headings below, plus settings on the command line that override it:

```yaml
model: {preset: nano, arch: sid}
data: {train: [embedded], seq_len: 256}
train: {steps: 300, out: runs/mine}
```

The same settings on the command line are `--model.preset nano --data.seq_len 256 --train.steps 300`.
An unknown key is an error that names the nearest one. A run folder keeps the config with every default filled in.
"""


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a class, as one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
    for field, doc in itertools.pairwise(body):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def flow(value: Any) -> str:
    """One-line YAML."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")
    return f"`{text}`"


def declared(field: dataclasses.Field) -> Any:
    """The default as it is written in the class, before one field is derived from others."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def row(*cells: str) -> str:
    return "| " + " | ".join(map(cell, cells)) + " |"


def section(name: str, cls: type, about: str) -> list[str]:
    docs, hints, default = field_docs(cls), typing.get_type_hints(cls), cls()
    inner: list[str] = []
    lines = [f"## {name}", "", about, "", row("key", "default", "takes", "meaning"), row(*["---"] * 4)]
    for field in dataclasses.fields(cls):
        if field.name not in docs:
            raise SystemExit(f"{cls.__name__}.{field.name} has no docstring under it")
        if dataclasses.is_dataclass(hints[field.name]):  # a section of its own
            inner += section(f"{name}.{field.name}", hints[field.name], paragraph(hints[field.name]))
            continue
        hint = describe(hints[field.name])
        lines.append(row(f"`{name}.{field.name}`", flow(getattr(default, field.name)), hint, docs[field.name]))
    return [*lines, "", *inner]


def paragraph(cls: type) -> str:
    parts = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)


def model_fields() -> list[str]:
    docs, fields = field_docs(SidConfig), {field.name: field for field in dataclasses.fields(SidConfig)}
    lines = ["## model.overrides", "", "Fields of `SidConfig`, as they stand in a model's config.json.", ""]
    lines += [row("field", "default", "meaning"), row(*["---"] * 3)]
    lines += [row(f"`{name}`", flow(declared(fields[name])), doc) for name, doc in docs.items()]
    return [*lines, ""]


def presets() -> list[str]:
    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
    lines = ["## Presets", "", "What `model.preset` sets.", "", row("preset", *(f"`{key}`" for key in keys))]
    lines.append(row(*["---"] * (len(keys) + 1)))
    for name, preset in PRESETS.items():
        lines.append(row(f"`{name}`", *(flow(preset[key]) if key in preset else "" for key in keys)))
    return [*lines, ""]


def render() -> str:
    lines = [HEAD]
    hints = typing.get_type_hints(ExtendConfig)
    for field in dataclasses.fields(ExtendConfig):  # those of a run, and `extend`
        cls = hints[field.name]
        lines += section(field.name, cls, paragraph(cls))
        if field.name == "model":
            lines += [*model_fields(), *presets()]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str]) -> int:
    text = render()
    if argv == ["--check"]:
        if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
            print(f"{TARGET} is not up to date; run `python tools/config_reference.py`", file=sys.stderr)
            return 1
        return 0
    if argv:
        print(__doc__, file=sys.stderr)
        return 2
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
