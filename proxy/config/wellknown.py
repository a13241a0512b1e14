"""The public registries that work without configuration."""

from __future__ import annotations

DOCKER_HUB = "docker.io"
DOCKER_HUB_ALIASES = ("index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
OLLAMA = "registry.ollama.ai"
HUGGING_FACE = "hf.co"
WELL_KNOWN = {
    DOCKER_HUB: "https://registry-1.docker.io",
    "ghcr.io": "https://ghcr.io",
    "quay.io": "https://quay.io",
    "registry.k8s.io": "https://registry.k8s.io",
    "gcr.io": "https://gcr.io",
    "mcr.microsoft.com": "https://mcr.microsoft.com",
    "public.ecr.aws": "https://public.ecr.aws",
    OLLAMA: "https://registry.ollama.ai",
    HUGGING_FACE: "https://hf.co",
}
# What these registries need, unless the configuration says otherwise.
DEFAULTS: dict[str, dict[str, object]] = {
    DOCKER_HUB: {"library": True},
    OLLAMA: {"library": True, "names": "any"},
    HUGGING_FACE: {"names": "any"},
}
# Further names, for a server without a configuration.
ALIASES = {OLLAMA: ["ollama"], HUGGING_FACE: ["huggingface.co"]}
