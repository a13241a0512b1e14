"""The difference of two images: platforms, layers, and values of the configuration: image-spec, config.md.

Only what is stored is compared: no upstream is asked.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from proxy.admin.image_config import ImageConfig, layer_steps, parse_config, read_config
from proxy.admin.tag_reports import Change, ImageDiff, LayerChange, PlatformDiff, ValueChange
from proxy.namespaces.references import FieldInvalid
from storage.concurrency import run_in_thread
from storage.errors import BlobUnknown, ManifestUnknown
from storage.graph import attestations, contents
from storage.names import written
from storage.oci import IMAGES, Descriptor, Digest, ManifestContent, platform_of
from storage.store import Store

MOST = 10_000  # layers and steps of an index; those of images have some hundreds


@dataclass(frozen=True, slots=True)
class _Image:
    """An image for one platform, as far as it is stored."""

    repository: str
    digest: Digest
    platform: str | None
    content: ManifestContent | None
    config: ImageConfig | None
    left_out: bool = False  # its index has too much to be compared

    @property
    def steps(self) -> int:
        """How many layers and steps of a build there are to compare."""
        layers = 0 if self.content is None else len(self.content.layers)
        return 1 + layers + (0 if self.config is None else len(self.config.history))


class ImageDiffer:
    """Compares stored images.  Every method may raise StorageFailed."""

    def __init__(self, cached: Store, private: Store | None, hosted: Container[str]) -> None:
        self._cached = cached
        self._private = private
        self._hosted = hosted

    async def diff(self, old: tuple[str, Digest], new: tuple[str, Digest]) -> ImageDiff:
        """The difference of two images, each a repository and a digest.  Raises ManifestUnknown."""
        former, latter = await self._images(*old), await self._images(*new)
        keys = [*latter, *(key for key in former if key not in latter)]
        if len(former) == len(latter) == 1:  # one of them may not state its platform
            (latter,) = ({keys[0]: each} for each in latter.values())
            (former,) = ({keys[0]: each} for each in former.values())
            keys = keys[:1]
        return ImageDiff(
            old=written(*old),
            new=written(*new),
            same=old[1] == new[1],
            # It takes seconds if there are thousands of layers.
            platforms=await run_in_thread(
                lambda: [self._platform(former.get(key), latter.get(key)) for key in keys]
            ),
        )

    async def _images(self, repository: str, digest: Digest) -> dict[tuple[str | None, int], _Image]:
        """The images of an index, or the one image; by platform, and the number among those of it."""
        store = self._store(repository)
        content = contents((await store.get_manifest(repository, digest)).content)
        if content is None or not content.listed:
            image = await self._image(repository, digest, None)
            return {(image.platform, 0): image}
        found: dict[tuple[str | None, int], _Image] = {}
        read: dict[Digest, _Image] = {}
        numbers: Counter[str | None] = Counter()
        skipped, left = attestations(content), MOST
        for child in content.children:
            if child.digest in skipped:
                continue
            if child.digest not in read:
                read[child.digest] = await self._image(repository, child.digest, None)
            image = read[child.digest]
            if image.steps > left:
                image = _Image(repository, child.digest, image.platform, None, None, left_out=True)
            left -= image.steps
            key = child.platform, numbers[child.platform]
            found[key] = replace(image, platform=child.platform or image.platform)
            numbers[child.platform] += 1
        return found

    async def _image(self, repository: str, digest: Digest, platform: str | None) -> _Image:
        content = config = None
        with suppress(ManifestUnknown):
            content = contents((await self._store(repository).get_manifest(repository, digest)).content)
        if content is not None and content.config is not None and content.media_type in IMAGES:
            with suppress(BlobUnknown, FieldInvalid):
                raw = await read_config(self._store(repository), repository, content.config.digest)
                config, platform = parse_config(raw), platform or platform_of(raw)
        return _Image(repository, digest, platform, content, config)

    def _store(self, repository: str) -> Store:
        private = self._private if repository.partition("/")[0] in self._hosted else None
        return private or self._cached

    def _platform(self, old: _Image | None, new: _Image | None) -> PlatformDiff:
        known = new or old
        assert known is not None
        change: Change = "changed"
        if old is None or new is None:
            change = "added" if old is None else "removed"
        elif old.digest == new.digest:
            change = "same"
        layers = [] if change == "same" else [*self._layers(old, new)]
        sizes = {
            kind: sum(each.size for each in layers if each.change == kind)
            for kind in ("added", "removed", "same")
        }
        if change == "same" and known.content is not None:
            sizes["same"] = sum(each.size for each in known.content.layers)
        return PlatformDiff(
            platform=known.platform,
            change=change,
            old=None if old is None else str(old.digest),
            new=None if new is None else str(new.digest),
            bytes_added=sizes["added"],
            bytes_removed=sizes["removed"],
            bytes_same=sizes["same"],
            layers=layers,
            values=[*_values(old, new)] if change == "changed" else [],
            unknown=[] if change == "same" else [*dict.fromkeys(_unknown(old, new))],
        )

    def _layers(self, old: _Image | None, new: _Image | None) -> Iterator[LayerChange]:
        """The layers of both, in order; none if those of one are not known."""
        if any(each is not None and each.content is None for each in (old, new)):
            return
        rows = [_described(each) for each in (old, new)]
        digests = [[layer.digest for layer, _ in each] for each in rows]
        matched = SequenceMatcher(None, digests[0], digests[1], autojunk=False)
        for kind, start, stop, begin, end in matched.get_opcodes():
            if kind != "equal":
                yield from (self._layer("removed", old, *each) for each in rows[0][start:stop])
            for each in rows[1][begin:end]:
                yield self._layer("same" if kind == "equal" else "added", new, *each)

    def _layer(self, change: Change, image: _Image | None, layer: Descriptor, step: str) -> LayerChange:
        assert image is not None
        return LayerChange(
            change=change,
            digest=str(layer.digest),
            media_type=layer.media_type,
            size=layer.size,
            stored=self._store(image.repository).linked(image.repository, layer.digest) is not None,
            created_by=step,
        )


def _described(image: _Image | None) -> list[tuple[Descriptor, str]]:
    """The layers of an image, and the step that made each."""
    layers = () if image is None or image.content is None else image.content.layers
    steps = layer_steps(image.config.history if image and image.config else [], len(layers))
    return [(layer, step.created_by if step else "") for layer, step in zip(layers, steps, strict=True)]


def _values(old: _Image | None, new: _Image | None) -> Iterator[ValueChange]:
    """What differs in two configurations; nothing if one is not known."""
    if old is None or new is None or old.config is None or new.config is None:
        return
    before, after = _named(old.config), _named(new.config)
    for kind, name in [*before, *(key for key in after if key not in before)]:
        values = before.get((kind, name)), after.get((kind, name))
        if values[0] != values[1]:
            yield ValueChange(kind=kind, name=name, old=values[0], new=values[1])
    steps = [[step.created_by for step in each.history] for each in (old.config, new.config)]
    matched = SequenceMatcher(None, steps[0], steps[1], autojunk=False)
    for kind, start, stop, begin, end in matched.get_opcodes():
        if kind != "equal":
            for number in range(start, stop):
                yield ValueChange(kind="history", name=str(number + 1), old=steps[0][number], new=None)
            for number in range(begin, end):
                yield ValueChange(kind="history", name=str(number + 1), old=None, new=steps[1][number])


def _unknown(old: _Image | None, new: _Image | None) -> Iterator[str]:
    for each in (old, new):
        if each is None:
            continue
        if each.left_out:
            yield f"{each.digest} is left out: an index is compared up to {MOST} layers and steps"
        elif each.content is None:
            yield f"{each.digest} is not stored, or cannot be read"
        elif each.config is None and each.content.media_type in IMAGES and each.content.config is not None:
            yield f"the configuration {each.content.config.digest} is not stored, or cannot be read"


def _named(config: ImageConfig) -> dict[tuple[str, str], str]:
    """What a configuration says beside its history, by kind and name."""
    values = {
        "os": config.os,
        "os.version": config.os_version,
        "architecture": config.architecture,
        "variant": config.variant,
        "created": config.created,
        "author": config.author,
        "user": config.user,
        "working directory": config.directory,
        "stop signal": config.stop_signal,
        "args escaped": config.args_escaped,
        "entrypoint": shlex.join(config.entrypoint),
        "command": shlex.join(config.command),
        "shell": shlex.join(config.shell),
        **{f"port {each}": "yes" for each in config.ports},
        **{f"volume {each}": "yes" for each in config.volumes},
    }
    named = {("config", name): value for name, value in values.items() if value}
    for variable in config.environment:
        name, _, value = variable.partition("=")
        named["env", name] = value
    return named | {("label", name): value for name, value in config.labels.items()}
