"""The images that files name: compose files, Kubernetes manifests (also the output of Helm), and plain lists.

The content decides what a document is.  A compose file has `services`.  A Kubernetes manifest has a `kind`,
and names images in containers at any depth, as in the pod template of another resource.  A list has one
reference per line, or is a YAML list.  Anything else is an error, since no image found in a file that
should hold images would look like success.

References of compose files and manifests are completed as clients do it; those of lists are kept as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

import yaml

from proxy.config.image_names import parse
from storage.names import written

# libyaml is ten times as fast, where PyYAML was built with it; rendered charts can be long.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CONTAINERS = ("initContainers", "containers", "ephemeralContainers")
PULLED = ("always", "missing", "if_not_present", "daily", "weekly")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPERATOR = re.compile(r":?[-?+]")
_SETTING = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_.]*)\s*=\s*(.*)")
_EXPECTED = (
    "expected a compose file (services:), Kubernetes manifests (kind:), or a list of references, one a line"
)


class Unreadable(ValueError):
    """A file that cannot be read.  The message is one line that names the file."""


@dataclass(frozen=True, slots=True)
class Mention:
    """A reference in a file; `place` is the file and the line."""

    reference: str
    place: str


@dataclass(slots=True)
class ImageMentions:
    """The references in files.  `built` are places of services that are built, and so not pulled."""

    mentions: list[Mention] = field(default_factory=list)
    built: list[str] = field(default_factory=list)

    @property
    def references(self) -> list[str]:
        """Each reference once, in their order."""
        return list(dict.fromkeys(each.reference for each in self.mentions))


def find_images(
    paths: Sequence[str],
    standard_input: TextIO,
    environ: Mapping[str, str],
    registries: Sequence[str] = (),
    *,
    plain: bool = False,
) -> ImageMentions:
    """The images that all files at `paths` name; `-` is standard input, `plain` files are lists.

    `registries` are addresses of this server, which are removed from names.  Raises Unreadable.
    """
    found = ImageMentions()
    for path in paths:
        name, text, settings = _read(path, standard_input)
        # As in Compose, the environment has precedence over .env beside the file.
        _Search(name, {**settings, **environ}, registries, found).search(text, plain)
    return found


def _read(path: str, standard_input: TextIO) -> tuple[str, str, Mapping[str, str]]:
    if path == "-":
        try:
            return "standard input", standard_input.read(), {}
        except UnicodeDecodeError as error:
            raise Unreadable(f"standard input: not UTF-8 at byte {error.start}") from None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path}: not UTF-8 at byte {error.start}") from None
    return path, text, _settings(Path(path).parent / ".env")


def _settings(path: Path) -> Mapping[str, str]:
    """The settings in a file of KEY=VALUE lines; none if there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    settings = {}
    for line in lines:
        if found := _SETTING.fullmatch(line.strip()):
            value = found[2]
            if value[:1] in ("'", '"') and (end := value.find(value[0], 1)) > 0:
                settings[found[1]] = value[1:end]
            else:
                settings[found[1]] = re.split(r"\s+#|^#", value)[0].strip()
    return settings


class _Search:
    """Searches one file."""

    def __init__(
        self, name: str, environ: Mapping[str, str], registries: Sequence[str], found: ImageMentions
    ) -> None:
        self._name = name
        self._environ = environ
        self._registries = registries
        self._found = found
        self._hint = ""
        self._seen: set[int] = (
            set()
        )  # nodes by id: an alias is the node that it names, which may contain itself

    def search(self, text: str, plain: bool) -> None:
        if plain or _is_list(text):
            for number, line in enumerate(text.splitlines(), 1):
                if reference := line.partition("#")[0].strip():
                    self._listed(reference, number)
            return
        if "{{" in text:
            self._hint = "; for a Helm chart, give the output of `helm template`"
        try:
            loader = _Loader(text)
            try:
                while loader.check_node():
                    self._document(loader, loader.get_node())
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._fail(mark.line + 1 if mark else 1, error.problem or "not YAML")
        except yaml.YAMLError as error:  # a character that YAML does not allow
            position = getattr(error, "position", 0)
            self._fail(text.count("\n", 0, position) + 1, "this character is not allowed in YAML")
        except RecursionError:
            self._fail(1, "nested too deeply, or an alias that contains itself")

    def _fail(self, line: int, cause: object) -> NoReturn:
        raise Unreadable(f"{self._name}:{line}: {cause}{self._hint}") from None

    def _document(self, loader: Any, node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            members = _members(loader, node)
            services = members.get("services")
            if "kind" in members:
                self._seen.clear()  # ids are unique only while the nodes of a document live
                self._manifest(loader, node)
            elif isinstance(services, yaml.MappingNode):
                for service in _members(loader, services).values():
                    self._service(loader, service)
            else:
                self._fail(_line(node), _EXPECTED)
        elif isinstance(node, yaml.SequenceNode):
            for each in node.value:
                if isinstance(each, yaml.ScalarNode):
                    self._listed(each.value, _line(each))
                else:
                    self._document(loader, each)
        elif not (isinstance(node, yaml.ScalarNode) and not node.value):
            self._fail(_line(node), _EXPECTED)

    def _service(self, loader: Any, service: yaml.Node) -> None:
        if not isinstance(service, yaml.MappingNode):
            return
        members = _members(loader, service)
        image, policy = _text(members.get("image")), _text(members.get("pull_policy")) or ""
        if "build" in members and not (image and (policy in PULLED or policy.startswith("every_"))):
            self._found.built.append(f"{self._name}:{_line(service)}")
        elif image:
            line = _line(members["image"])
            try:
                reference = interpolate(image, self._environ)
            except ValueError as error:
                self._fail(line, error)
            self._named(reference, line)

    def _manifest(self, loader: Any, node: yaml.Node) -> None:
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for each in node.value:
                self._manifest(loader, each)
        elif isinstance(node, yaml.MappingNode):
            members = _members(loader, node)
            for key, value in members.items():
                if isinstance(value, yaml.SequenceNode):
                    for image in _images(loader, key, value):
                        self._named(str(image.value), _line(image))
                self._manifest(loader, value)

    def _named(self, reference: str, line: int) -> None:
        try:
            full = full_name(reference.strip(), self._registries)
        except ValueError as error:
            self._fail(line, error)
        self._found.mentions.append(Mention(full, f"{self._name}:{line}"))

    def _listed(self, reference: str, line: int) -> None:
        try:
            full = full_name(reference, self._registries)
        except ValueError as error:
            self._fail(line, error)
        own = reference.partition("/")[0] in self._registries
        self._found.mentions.append(Mention(full if own else reference, f"{self._name}:{line}"))


def _is_list(text: str) -> bool:
    """Whether each line is empty, a comment, or one word that is not YAML syntax."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return all(
        len(line.split()) == 1 and line[0] not in "{}[]'\"-&*!%|>?" and not line.endswith(":")
        for line in lines
        if line
    )


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _members(loader: Any, node: yaml.MappingNode) -> dict[str, yaml.Node]:
    """The members of a mapping, with those that `<<` merges in; its own keys have precedence."""
    loader.flatten_mapping(node)
    return {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}


def _text(node: yaml.Node | None) -> str | None:
    """The text of a node; None for a missing one, for null, and for `!reset` of Compose."""
    if not isinstance(node, yaml.ScalarNode) or node.tag in ("tag:yaml.org,2002:null", "!reset"):
        return None
    return str(node.value)


def _images(loader: Any, key: str, items: yaml.SequenceNode) -> Iterator[yaml.Node]:
    """The images of containers, or of volumes that are images."""
    for each in items.value:
        if not isinstance(each, yaml.MappingNode):
            continue
        image = _members(loader, each).get("image")
        if key == "volumes" and isinstance(image, yaml.MappingNode):
            image = _members(loader, image).get("reference")
        elif key not in CONTAINERS:
            continue
        if image is not None and image.value:  # a pod template may leave it empty
            yield image


def full_name(text: str, registries: Sequence[str] = ()) -> str:
    """The name in full, as clients complete it: `alpine` is docker.io/library/alpine:latest.

    Below one of `registries`, what follows it: this server reads that as it reads its clients' names.
    Raises ValueError.
    """
    name = parse(text)
    if name.host in registries:
        return written(name.repository, name.reference)
    return str(name)


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Substitute variables (compose-spec, "Interpolation").

    Raises ValueError for a variable that is not set and has no default.
    """
    found, at = "", 0
    while (dollar := text.find("$", at)) >= 0:
        found += text[at:dollar]
        at = dollar + 1
        if text.startswith("$", at):
            found, at = f"{found}$", at + 1
            continue
        braced = text.startswith("{", at)
        name = _VARIABLE.match(text, at + braced)
        if name is None:
            raise ValueError("$ must be followed by a variable; a literal $ is written $$")
        end = _closing(text, at) if braced else name.end()
        found += _value(name[0], text[name.end() : end], environ)
        at = end + braced
    return found + text[at:]


def _closing(text: str, start: int) -> int:
    """The index of the brace that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if not depth:
                return at
    raise ValueError("${ without a closing }")


def _value(name: str, rest: str, environ: Mapping[str, str]) -> str:
    """The value of `${name}`, or of `${name:-default}` with `rest` being `:-default`."""
    value = environ.get(name)
    if not rest:
        if value is None:
            raise ValueError(f"the variable {name} is not set, and has no default")
        return value
    operator = _OPERATOR.match(rest)
    if operator is None:
        raise ValueError(f"${{{name}{rest}}} is not an interpolation of Compose")
    other = rest[operator.end() :]
    there = value is not None and not (operator[0].startswith(":") and not value)
    if operator[0].endswith("?") and not there:
        raise ValueError(f"the variable {name} is not set: {interpolate(other, environ)}")
    if operator[0].endswith("+"):
        return interpolate(other, environ) if there else ""
    return value if there and value is not None else interpolate(other, environ)
