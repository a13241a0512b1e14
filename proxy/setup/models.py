"""How clients of AI models pull through this server: Ollama and Docker Model Runner."""

from __future__ import annotations

from proxy.config.wellknown import DOCKER_HUB, HUGGING_FACE, OLLAMA
from proxy.setup.site import SYSTEM, Piece, Setup, Site, loopback_notes


def ollama(site: Site) -> Setup:
    scheme, flag = ("http://", " --insecure") if site.plain else ("", "")
    names = []
    if alias := site.aliases.get(OLLAMA):
        names.append(f"{site.host}/{alias}/llama3.2:1b")
    if own := site.named.get(OLLAMA):
        names += [f"{own}/library/llama3.2:1b", f"{own}/MFDoom/deepseek-r1-tool-calling:1.5b"]
    if own := site.named.get(HUGGING_FACE):
        names.append(f"{own}/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M")
    commands = "".join(f"ollama pull {scheme}{each}{flag}\n" for each in names)
    notes = [
        "Ollama has no setting for a mirror: models are named with the server, and two elements behind it",
        "it sends no password: let it in by its address (access.rules, from)",
    ]
    if not names:
        notes.append(
            f"no name is possible: give {OLLAMA} an alias without a dot, or a name of its own (hosts), in the"
            " configuration of the server"
        )
    elif not site.named.keys() & {OLLAMA, HUGGING_FACE}:
        notes.append("models of users, and of hf.co, need a namespace with a name of its own (hosts)")
    pieces = [Piece("commands", commands, "example")] if names else []
    after = "nothing else: each name says which server is asked"
    return Setup("ollama", pieces, after, notes, trust=f"{SYSTEM}, and restart ollama")


def model_runner(site: Site) -> Setup:
    notes = [
        "mirrors are for models of Docker Hub (ai/…) only; those of hf.co are fetched as files, not by a"
        " registry",
        "Docker Desktop uses registry-mirrors of daemon.json: entrepot setup docker-desktop",
        *loopback_notes(site),
    ]
    pieces = []
    if DOCKER_HUB in site.namespaces:
        command = f"MODEL_RUNNER_REGISTRY_MIRRORS={site.hub_url} docker model reinstall-runner\n"
        pieces.append(Piece("commands", command, "example"))
    else:
        notes.append(f"{DOCKER_HUB} is not among the namespaces")
    if not site.bypass:
        notes.append("Docker Hub itself is asked if the server fails, and no setting prevents that")
    after = "nothing else: the runner keeps the variable"
    trust = "build an image of the runner that has FILE among its authorities"
    undo = "docker model reinstall-runner without the variable"
    return Setup("model-runner", pieces, after, notes, undo=undo, trust=trust)
