"""YAML as the configuration is written in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from proxy.config.errors import ConfigError
from proxy.config.faults import join
from proxy.config.values import kind_of


def parse_yaml(text: str) -> Any:
    """The value of a text.  Raises ValueError with half a sentence, which quotes nothing of the text."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        raise ValueError("is not YAML") from None


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, and raises a YAMLError for every failure."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Not in construct_mapping: by then `<<` may have added keys that the mapping overrides.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"duplicate key {key.value!r}"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError):  # such as for the date 2025-02-30
            kind = node.tag.rpartition(":")[2]
            problem = f"looks like a YAML {kind} but is not a valid one: put it in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


def key_lines(path: Path) -> dict[str, int]:
    """The line of each key and item of a file that read_file() reads, by its path.

    What is taken over by an alias or `<<` has none of its own.
    """
    found: dict[str, int] = {}

    def note(node: yaml.Node | None, at: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inside = join(at, str(key.value))
                if inside not in found:  # else an alias refers to what contains it
                    found[inside] = key.start_mark.line + 1
                    note(value, inside)
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                inside = f"{at}[{number}]"
                if inside not in found:
                    found[inside] = item.start_mark.line + 1
                    note(item, inside)

    note(yaml.compose(path.read_text(encoding="utf-8"), _Loader), "")
    return found


def read_file(path: Path) -> dict[Any, Any]:
    """The mapping in a file, empty for an empty file.  Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (ValueError, OverflowError) as error:  # the scanner's, for escapes such as "\\U00110000"
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        # An alias or a tag may be a password without quotes that begins with * or !, so it is not shown.
        hint = r"\1: text that begins with *, & or ! needs quotes"
        problem = re.sub(r"\b(alias|anchor|handle|tag) ['\"].*", hint, error.problem or "not YAML")
        raise ConfigError(f"{path}{place}: not YAML here: {problem}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ConfigError(f"{path}:{line}:{column}: this character is not allowed in YAML") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {kind_of(tree)}")
    return tree or {}
