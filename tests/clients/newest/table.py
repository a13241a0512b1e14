"""The clients of the laboratory: where each comes from, and its commands.

Commands are for `sh -eu`, in an empty directory that is also HOME.  They find in the environment:

    IMAGE      what to pull, push, sign or verify, as host:port/namespace/library/app:0.1.0
    SOURCE     what to push, in the cache
    PRIVATE    where to push it at the address that only the private namespace has
    MIRRORED   the same image by its name at its registry, for clients that `entrepot setup` has configured
    REGISTRY   host:port of the server
    LOGIN      the user, PASSWORD the user's, right or wrong
    SHARED     a directory that is kept from `setup` to the end
    PROGRAMS   the directory of the sources of programs
    TOOLS      the directory of what was installed
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.clients.newest.sources import Crate, Go, Installed, Maven, Npm, PyPI, Source

DOCKER_CONFIG = """
mkdir -p .docker
auth=$(printf %s "$LOGIN:$PASSWORD" | base64)
printf '{"auths":{"%s":{"auth":"%s"}}}' "$REGISTRY" "$auth" >.docker/config.json
"""


@dataclass(frozen=True)
class Client:
    """Commands are empty for what the client does not do.

    `daemon` runs during each of the others, from its line with `ready` on.  `mirror` is a client of
    `entrepot setup`, which configures it.  With `makes`, `push` makes what it pushes, and upstreams are
    filled by it.
    """

    name: str
    sources: tuple[Source, ...]
    setup: str = ""
    daemon: str = ""
    ready: str = ""
    mirror: str = ""
    makes: bool = False
    pull: str = ""
    login: str = ""
    push: str = ""
    sign: str = ""
    verify: str = ""


CRANE = Client(
    "crane",
    (Go("github.com/google/go-containerregistry/cmd/crane"),),
    pull='crane pull "$IMAGE" app.tar',
    login='crane auth login "$REGISTRY" -u "$LOGIN" -p "$PASSWORD"',
    push='crane copy "$SOURCE" "$IMAGE"',
)

REGCTL = Client(
    "regctl",
    (Go("github.com/regclient/regclient/cmd/regctl"),),
    pull='regctl registry set --tls=disabled "$REGISTRY"; regctl image copy "$IMAGE" ocidir://app',
    login="""
regctl registry set --tls=disabled "$REGISTRY"
regctl registry login "$REGISTRY" -u "$LOGIN" -p "$PASSWORD"
""",
    push='regctl image copy "$SOURCE" "$IMAGE"',
)

# Its library is that of podman, buildah and CRI-O too.
CONTAINERS_IMAGE = Client(
    "containers/image (skopeo, podman)",
    (
        Go(
            "go.podman.io/image/v5",
            source="imagecopy.go",
            tags="containers_image_openpgp,exclude_graphdriver_btrfs",
        ),
    ),
    mirror="podman",
    pull='imagecopy "docker://$IMAGE" oci:app:1; imagecopy "docker://$MIRRORED" oci:mirrored:1',
    login=DOCKER_CONFIG,
    push='imagecopy "docker://$SOURCE" "docker://$IMAGE"',
)

PODMAN = Client(
    "podman",
    (Installed("podman"),),
    mirror="podman",
    pull='podman --root=root --runroot=run --storage-driver=vfs pull "$MIRRORED"',
    login='podman login --tls-verify=false -u "$LOGIN" -p "$PASSWORD" "$REGISTRY"',
    push="""
podman --root=root --runroot=run --storage-driver=vfs pull --tls-verify=false "$SOURCE"
podman --root=root --runroot=run --storage-driver=vfs push --tls-verify=false "$SOURCE" "$IMAGE"
""",
)

CONTAINERD = Client(
    "containerd (ctr)",
    (
        Go("github.com/containerd/containerd/v2/cmd/containerd"),
        Go("github.com/containerd/containerd/v2/cmd/ctr"),
    ),
    mirror="containerd",
    daemon="""
cat >config.toml <<END
version = 3
root = "$HOME/root"
state = "$HOME/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "$HOME/sock"
END
exec containerd --config config.toml
""",
    ready="containerd successfully booted",
    pull='ctr -a "$HOME/sock" images pull --hosts-dir etc/containerd/certs.d "$MIRRORED"',
    push="""
ctr -a "$HOME/sock" images pull --hosts-dir etc/containerd/certs.d "$MIRRORED"
ctr -a "$HOME/sock" images push --plain-http --user "$LOGIN:$PASSWORD" "$IMAGE" "$MIRRORED"
""",
)

BUILDKITD = """
exec buildkitd --root root --addr "unix://$HOME/sock" --config etc/buildkit/buildkitd.toml \\
    --containerd-worker=false --oci-worker-net=host --oci-worker-snapshotter=SNAPSHOTTER
"""
BUILD = """
buildctl --addr "unix://$HOME/sock" build --frontend dockerfile.v0 --local context=. --local dockerfile=. \\
    --output"""

BUILDKIT = Client(
    "BuildKit",
    (Go("github.com/moby/buildkit/cmd/buildkitd"), Go("github.com/moby/buildkit/cmd/buildctl")),
    mirror="buildkit",
    daemon=BUILDKITD.replace("SNAPSHOTTER", "native"),
    ready="running server on",
    pull=f"""
printf 'FROM %s\\nCOPY Dockerfile /added\\n' "$MIRRORED" >Dockerfile
{BUILD} type=oci,dest=app.tar
""",
    login=DOCKER_CONFIG,
    push=f"""
printf 'FROM %s\\nCOPY Dockerfile /added\\n' "$MIRRORED" >Dockerfile
{BUILD} "type=image,name=$IMAGE,push=true,registry.insecure=true"
""",
)

# It reads one file of a layer, which stargz-snapshotter fetches by ranges.
STARGZ = replace(
    BUILDKIT,
    name="stargz-snapshotter (in BuildKit)",
    daemon=BUILDKITD.replace("SNAPSHOTTER", "stargz"),
    makes=True,
    pull=f"""
printf 'FROM %s AS lazy\\nFROM scratch\\nCOPY --from=lazy /1 /\\n' "$MIRRORED" >Dockerfile
{BUILD} type=local,dest=out
seq 1000 | cmp - out/1
""",
    push=f"""
for each in $(seq 20); do seq $((1000 * each)) >$each; done
printf 'FROM scratch\\nCOPY [0-9]* /\\n' >Dockerfile
{BUILD} "type=image,name=$IMAGE,push=true,registry.insecure=true,compression=estargz,oci-mediatypes=true"
""",
)

DOCKERD = Client(
    "dockerd (containerd image store)",
    (
        Go("github.com/moby/moby/v2/cmd/dockerd"),
        Go("github.com/containerd/containerd/v2/cmd/containerd"),
        PyPI("docker"),
    ),
    mirror="docker",
    daemon="""
mkdir -p /etc/docker
exec unshare --mount sh -euc 'mount --bind etc/docker /etc/docker; exec "$@"' sh \\
    dockerd --config-file "$HOME/etc/docker/daemon.json" --host "unix://$HOME/docker.sock" \\
    --data-root "$HOME/data" --exec-root "$HOME/run" --pidfile "$HOME/dockerd.pid" \\
    --bridge=none --iptables=false --ip6tables=false --feature containerd-snapshotter=true
""",
    ready="API listen on",
    pull='python "$PROGRAMS/engine.py" pull "$MIRRORED"',
    login='python "$PROGRAMS/engine.py" login "$REGISTRY"',
    push='python "$PROGRAMS/engine.py" push "$MIRRORED" "$IMAGE"',
)

ORAS = Client(
    "oras",
    (Go("oras.land/oras/cmd/oras"),),
    pull='oras copy --from-plain-http "$IMAGE" --to-oci-layout app:1',
    login='oras login --plain-http -u "$LOGIN" -p "$PASSWORD" "$REGISTRY"',
    push='oras copy --from-plain-http "$SOURCE" --to-plain-http "$IMAGE"',
    sign="""
echo parts >parts.txt
oras attach --plain-http --artifact-type application/x-parts "$IMAGE" parts.txt
""",
    verify='oras discover --plain-http --format json "$IMAGE" | grep application/x-parts',
)

COSIGN = Client(
    "cosign",
    (Go("github.com/sigstore/cosign/v3/cmd/cosign"),),
    setup='cd "$SHARED"; COSIGN_PASSWORD="" cosign generate-key-pair',
    pull='cosign save --dir app "$IMAGE"',
    login='cosign login -u "$LOGIN" -p "$PASSWORD" "$REGISTRY"',
    push='cosign copy "$SOURCE" "$IMAGE"',
    sign="""
COSIGN_PASSWORD="" cosign sign --yes --key "$SHARED/cosign.key" --use-signing-config=false \\
    --tlog-upload=false "$IMAGE"
""",
    verify='cosign verify --key "$SHARED/cosign.pub" --insecure-ignore-tlog "$IMAGE"',
)

NOTATION = Client(
    "notation-go (notation)",
    (Go("github.com/notaryproject/notation-go", source="notary.go"),),
    setup='notary keys "$SHARED"',
    sign='notary sign "$SHARED" "$IMAGE"',
    verify='notary verify "$SHARED" "$IMAGE"',
)

HELM = Client(
    "helm",
    (Go("helm.sh/helm/v4/cmd/helm"),),
    makes=True,
    pull='helm pull --plain-http "oci://${IMAGE%:*}" --version "${IMAGE##*:}"',
    login='helm registry login --plain-http -u "$LOGIN" -p "$PASSWORD" "$REGISTRY"',
    push="""
helm create app
helm package app --version 0.1.0
helm push --plain-http app-0.1.0.tgz "oci://${IMAGE%/app:*}"
""",
)

FLUX = Client(
    "fluxcd/pkg/oci (flux)",
    (Go("github.com/fluxcd/pkg/oci", source="fluxoci.go"),),
    makes=True,
    pull='fluxoci pull "$IMAGE"; test -s pulled/some.yaml',
    login=DOCKER_CONFIG,
    push='mkdir files; echo some >files/some.yaml; fluxoci push "$IMAGE"',
)

TRIVY = Client(
    "trivy",
    (Go("github.com/aquasecurity/trivy/cmd/trivy", experiment="jsonv2"),),
    mirror="trivy",
    pull="""
trivy image --insecure --image-src remote --format cyclonedx --output app.json "$IMAGE"
export TRIVY_CONFIG="$HOME/etc/entrepot/clients/trivy/trivy.yaml"
trivy image --image-src remote --format cyclonedx --output mirrored.json "$MIRRORED"
""",
    login='trivy registry login --insecure --username "$LOGIN" --password "$PASSWORD" "$REGISTRY"',
)

JIB = Client(
    "Jib",
    (Maven("com.google.cloud.tools", "jib-core"),),
    pull='java -cp "$TOOLS/maven/*" "$PROGRAMS/Jib.java" "$IMAGE" tar:app.tar',
    push='java -DsendCredentialsOverHttp=true -cp "$TOOLS/maven/*" "$PROGRAMS/Jib.java" "$SOURCE" "$IMAGE"',
)

ORAS_PY = Client(
    "oras-py",
    (PyPI("oras"),),
    makes=True,
    pull='python "$PROGRAMS/oras_py.py" pull "$IMAGE"',
    push='python "$PROGRAMS/oras_py.py" push "$IMAGE"',
)

DXF = Client(  # it sends passwords by https only, so it pushes nothing here
    "python-dxf",
    (PyPI("python-dxf"),),
    pull="""
path=${IMAGE#*/}; export DXF_INSECURE=1 DXF_HOST="$REGISTRY"
dxf pull-blob "${path%:*}" @"${path##*:}" >layers
test -s layers
""",
)

SNYK = Client(
    "Snyk's registry client",
    (Npm("@snyk/docker-registry-v2-client"),),
    login=":",  # credentials are parameters of each call
    pull='NODE_PATH="$TOOLS/npm/node_modules" node "$PROGRAMS/snyk.js" "$IMAGE"',
)

OCI_CLIENT = Client(  # it uses a password only where GET /v2/ demands one
    "oci-client (Rust)",
    (Crate("oci-client", "ociclient.rs", feature="rustls-tls"),),
    pull='ociclient "$IMAGE"',
    push='ociclient "$SOURCE" "$PRIVATE"',
)

CLIENTS = (
    *(CRANE, REGCTL, CONTAINERS_IMAGE, PODMAN, CONTAINERD, BUILDKIT, STARGZ, DOCKERD, ORAS, COSIGN),
    *(NOTATION, HELM, FLUX, TRIVY, JIB, ORAS_PY, DXF, SNYK, OCI_CLIENT),
)
