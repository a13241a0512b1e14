"""An image: its platforms, layers, configuration, history and referrers; and the files of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aiohttp import web

from proxy.admin.image_config import layer_steps
from proxy.admin.models import BuildStep, ConfigReport, ImageNode
from proxy.admin.operations import Operations
from proxy.admin.policy_reports import PolicyExplained
from proxy.namespaces.references import FieldInvalid
from proxy.ui.listing import ROWS, ListView
from proxy.ui.rendering import Renderer, short
from storage.errors import RegistryError
from storage.names import written

MOST = 300_000  # manifests and blobs that are added up for a page
# What a media type or an artifact type tells, by a part of it; the first that fits.
_KINDS = (
    ("simplesigning", "signature"),
    ("notary.signature", "signature"),
    ("spdx", "SBOM"),
    ("cyclonedx", "SBOM"),
    ("syft", "SBOM"),
    ("in-toto", "attestation"),
    ("dsse", "attestation"),
    ("sigstore.bundle", "signature or attestation"),
    ("cosign", "signature"),
)


@dataclass(frozen=True, slots=True)
class PartRow:
    """A manifest in an index or among the referrers: `held` of its `whole` bytes are here."""

    node: ImageNode
    kind: str
    whole: int | None
    held: int
    complete: bool


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer, and the step of the build that made it, as far as that is known."""

    number: int
    node: ImageNode
    step: BuildStep | None


class ImageScreen:
    """One image, and one layer."""

    def __init__(self, operations: Operations, renderer: Renderer) -> None:
        self._operations = operations
        self._renderer = renderer

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/image", self._show), web.get("/files", self._files)]

    async def _show(self, request: web.Request) -> web.Response:
        ref = request.query.get("ref", "").strip()
        if not ref:
            raise FieldInvalid("ref", "expected a reference such as alpine:3")
        tree, why = await self._operations.show(ref), await self._operations.why(ref)
        exact, sums = written(tree.repository, tree.digest), Sums((tree.node, *tree.referrers))
        index = any(each.role == "manifest" for each in tree.node.children)
        config = None if index else await self._config(exact)
        blobs = [each for each in tree.node.children if each.role != "manifest"]
        judged = await self._judged(ref) if "judge" in request.query else None
        return self._renderer.page(
            request,
            "image.html",
            written(tree.repository, short(tree.reference)),
            tree=tree,
            exact=exact,
            whole=sums.part(tree.node),
            platforms=[sums.part(each) for each in tree.node.children if each.role == "manifest"],
            layers=layers([each for each in blobs if each.role == "layer"], config),
            configured=next((each for each in blobs if each.role == "config"), None),
            config=config,
            referrers=[sums.part(each) for each in tree.referrers],
            why=why,
            judged=judged,
        )

    async def _config(self, ref: str) -> ConfigReport | None:
        try:
            return await self._operations.config(ref)
        except (RegistryError, FieldInvalid):
            return None  # it is not stored, or none

    async def _judged(self, ref: str) -> PolicyExplained | str:
        """What the policy says of it, or why that cannot be told."""
        try:
            return await self._operations.policy(ref)
        except RegistryError as error:
            return str(error)

    async def _files(self, request: web.Request) -> web.Response:
        ref = request.query.get("ref", "").strip()
        view = ListView(request, "files", fields={"ref": ref})
        found = await self._operations.files(ref, view.search, view.offset, ROWS)
        title = "Files of a layer"
        return self._renderer.page(request, "files.html", title, view=view, ref=ref, found=found)


class Sums:
    """Sums over parts of a tree, in which each content counts once.

    What a manifest names is in the tree at the first place that names it.
    """

    def __init__(self, tops: Iterable[ImageNode]) -> None:
        self._expanded: dict[str, ImageNode] = {}
        self._left = MOST
        steps = list(tops)
        while steps:
            each = steps.pop()
            if each.children:
                self._expanded[each.digest] = each
            steps += each.children

    def part(self, node: ImageNode) -> PartRow:
        """A manifest with all below it; its sizes are unknown if they take too long to add up."""
        seen: dict[str, ImageNode] = {}
        steps = [node]
        while steps and self._left > 0:
            each = steps.pop()
            if each.digest not in seen:
                seen[each.digest] = each
                below = self._expanded.get(each.digest, each).children
                self._left -= 1 + len(below)
                steps += below
        held = sum(max(0, each.size) for each in seen.values() if each.present)
        if steps:
            return PartRow(node, kind_of(node), None, held, False)
        whole = sum(max(0, each.size) for each in seen.values())
        return PartRow(node, kind_of(node), whole, held, all(each.present for each in seen.values()))


def kind_of(node: ImageNode) -> str:
    """What a manifest is for, by the types that it and its blobs have; empty if they do not tell."""
    types = [node.artifact_type or "", *(each.media_type for each in node.children), node.media_type]
    return next((kind for piece, kind in _KINDS for each in types if piece in each.lower()), "")


def layers(nodes: Sequence[ImageNode], config: ConfigReport | None) -> list[LayerRow]:
    """The layers with their steps, if there are as many of one as of the other."""
    steps = layer_steps(config.history if config else [], len(nodes))
    return [
        LayerRow(number, node, step) for number, (node, step) in enumerate(zip(nodes, steps, strict=True), 1)
    ]
