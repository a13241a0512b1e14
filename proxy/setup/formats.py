"""The formats of configuration files: JSON, TOML and YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml


def in_json(keys: Mapping[str, Any]) -> str:
    """A JSON object with one line per key."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in keys.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def quoted(*texts: str) -> str:
    """A list of strings in TOML."""
    return f"[{', '.join(json.dumps(each) for each in texts)}]"


def in_yaml(*trees: Mapping[str, Any]) -> str:
    """YAML documents, with multi-line text as blocks, and without anchors."""
    return "---\n".join(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=1000) for tree in trees)


_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C where it was built


class _Dumper(_SafeDumper):  # type: ignore[misc]
    """A dumper that writes multi-line text as a block, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Any, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
