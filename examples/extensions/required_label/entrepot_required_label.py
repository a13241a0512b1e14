"""A policy condition: images must have labels, such as that of the team that answers for them."""

import json
from dataclasses import dataclass, field
from typing import Any

from proxy.extensions.protocols import ConditionResult, JudgedManifest, PolicyCondition

STATEMENT = "application/vnd.in-toto+json"


@dataclass
class LabelSettings:
    """Labels by name; an empty value stands for any."""

    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("labels: name at least one")


class RequiredLabel(PolicyCondition):
    """An index meets it if each of its images does."""

    protocol = 1
    Settings = LabelSettings

    def __init__(self, settings: LabelSettings) -> None:
        self._labels = settings.labels

    async def judge(self, manifest: JudgedManifest) -> ConditionResult:
        missing = await self._missing(manifest, json.loads(manifest.content))
        if missing:
            return ConditionResult(False, f"has no label {missing}")
        return ConditionResult(True, f"has the label {', '.join(self._labels)}")

    async def _missing(self, source: JudgedManifest, manifest: dict[str, Any]) -> str:
        for each in manifest.get("manifests", []):
            if missing := await self._missing(source, json.loads(await source.manifest(each["digest"]))):
                return missing
        types = {each["mediaType"] for each in manifest.get("layers", [])}
        if "manifests" in manifest or types == {STATEMENT}:  # attestations of a build, which nobody runs
            return ""
        config = json.loads(await source.blob(manifest["config"]["digest"])) if "config" in manifest else {}
        labels = config.get("config", {}).get("Labels") or {}
        for name, value in self._labels.items():
            if name not in labels or value not in ("", labels[name]):
                return f"{name}={value}" if value else name
        return ""
