#!/usr/bin/env bash
# What the Makefile does with the image: launch/image.sh build | push | run [WORD...] | print | pin-base | sbom | lock
#
#   REGISTRY    where it is pushed to                                   registry.example.com
#   IMAGE       its name there                                          wikillm
#   TAG         its tag                                                 the git revision; a changed tree is refused
#   REFERENCE   another image for `run` and `sbom`, as name@digest      $REGISTRY/$IMAGE:$TAG
#   PLATFORM    what it is built for                                    linux/amd64
#   ENGINE      docker or podman                                        the one that answers
#   CA_BUNDLE   certificates to trust while building, never kept        SSL_CERT_FILE, if set
#   NETRC       credentials of a package index, never kept              none
#   BUILD_ARGS  more words for the build, as --build-arg=INDEX_URL=...  none
#   PUSH_ARGS   more words for podman's push, as --tls-verify=false     none
#   RUN_ARGS    more words for `run`, as --volume=/data:/data:ro        none
#   SCRATCH     volume or folder for caches when it runs                wikillm-scratch
set -euo pipefail
cd "$(dirname "$0")/.."

REGISTRY=${REGISTRY:-registry.example.com}
IMAGE=${IMAGE:-wikillm}
PLATFORM=${PLATFORM:-linux/amd64}
CA_BUNDLE=${CA_BUNDLE:-${SSL_CERT_FILE:-}}
DOCKERFILE=${DOCKERFILE:-Dockerfile}
PUSHED=build/image-pushed
export DOCKER_BUILDKIT=1 BUILDAH_FORMAT=docker

die() {
    echo "$1" >&2
    exit 2
}

# The revision that the image says it is made from; its first characters are the tag.
read_revision() {
    revision=$(git rev-parse HEAD 2>/dev/null) || die "not a git checkout: the image could not say what it was built from"
    if [[ -n $(git status --porcelain) ]]; then
        [[ ${ALLOW_DIRTY:-} == 1 ]] || die "the tree has changes that are not committed: commit them, or say ALLOW_DIRTY=1"
        revision+=-dirty
    fi
    TAG=${TAG:-${revision:0:12}${revision:40}}
    reference=$REGISTRY/$IMAGE:$TAG
}

find_engine() {
    local one
    for one in ${ENGINE:-docker podman}; do
        if "$one" info >/dev/null 2>&1; then
            engine=$one
            return
        fi
    done
    die "no answer from ${ENGINE:-docker or podman}: is it installed, and does its daemon run?"
}

is_podman() { [[ ${engine##*/} == podman* ]]; }

build() {
    local words=() version source
    [[ ${BUILD_ARGS:-} =~ ://[^/[:space:]]*@ ]] &&
        die "BUILD_ARGS: holds a user or password in a URL, which the image's history would keep: give NETRC=FILE"
    version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)
    source=$(git remote get-url origin 2>/dev/null | sed 's#//[^/]*@#//#') || source=unpublished
    [[ -n $CA_BUNDLE ]] && words+=(--secret "id=ca,src=$CA_BUNDLE")
    [[ -n ${NETRC:-} ]] && words+=(--secret "id=netrc,src=$NETRC")
    # shellcheck disable=SC2206  # several words
    words+=(${BUILD_ARGS:-})
    "$engine" build --file "$DOCKERFILE" --platform "$PLATFORM" --tag "$reference" \
        --build-arg "REVISION=$revision" --build-arg "VERSION=$version" --build-arg "SOURCE=$source" \
        --build-arg "CREATED=$(git log -1 --format=%cI)" "${words[@]}" .
    "$engine" image inspect --format '{{.Size}}' "$reference" | awk -v name="$reference" '{ printf "%s: %.2f GB\n", name, $1 / 1e9 }'
}

# A digest names these very bytes for ever, a tag whatever is pushed under it next.
push() {
    local digest
    mkdir -p build
    if is_podman; then
        # shellcheck disable=SC2086  # several words
        "$engine" push ${PUSH_ARGS:-} --digestfile "$PUSHED.digest" "$reference"
        digest=$(<"$PUSHED.digest")
        rm "$PUSHED.digest"
    else
        digest=$("$engine" push "$reference" | tee /dev/stderr | sed -n 's/.* digest: \(sha256:[0-9a-f]*\).*/\1/p')
    fi
    echo "$REGISTRY/$IMAGE@$digest" | tee "$PUSHED"
}

# As strict as the strictest cluster: no root, no capability, nothing written but /tmp and the scratch volume.
run() {
    local words=() name
    for name in AWS_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_DEFAULT_REGION \
        SWANLAB_API_KEY HF_ENDPOINT HF_TOKEN; do
        [[ -n ${!name:-} ]] && words+=(--env "$name")
    done
    if command -v nvidia-smi >/dev/null; then
        if is_podman; then words+=(--device nvidia.com/gpu=all); else words+=(--gpus all); fi
    fi
    # shellcheck disable=SC2206  # several words
    words+=(${RUN_ARGS:-})
    exec "$engine" run --rm --network host --read-only --tmpfs /tmp --shm-size 8g \
        --volume "${SCRATCH:-wikillm-scratch}:/scratch" --cap-drop ALL --security-opt no-new-privileges \
        "${words[@]}" "$reference" "$@"
}

pin_base() {
    local base digest
    base=$(sed -n 's/^ARG BASE_IMAGE=\([^@]*\).*/\1/p' "$DOCKERFILE")
    "$engine" pull --platform "$PLATFORM" "$base"
    digest=$("$engine" image inspect --format '{{index .RepoDigests 0}}' "$base" | sed 's/.*@//')
    sed -i "s#^ARG BASE_IMAGE=.*#ARG BASE_IMAGE=$base@$digest#" "$DOCKERFILE"
    grep '^ARG BASE_IMAGE=.*@sha256:' "$DOCKERFILE"
}

sbom() {
    mkdir -p build
    "$engine" run --rm --network none --entrypoint cat "$reference" /app/sbom.cdx.json >build/sbom.cdx.json
    echo "build/sbom.cdx.json: $(grep -c '"purl"' build/sbom.cdx.json) components"
}

# Hashes of every file of the versions in requirements.lock, for the base's Python: torch is the index's own, with CUDA.
lock() {
    local made uv
    made=$(mktemp -d)
    # shellcheck disable=SC2064  # the folder's name now
    trap "rm -rf '$made'" EXIT
    python3 -m venv "$made/venv"
    uv=$made/venv/bin/uv
    "$made/venv/bin/pip" install --quiet "$(grep '^uv==' launch/image-tools.in)"
    compile() {
        {
            echo "# Made by \`make lock-image\` from $1: exact versions and the hashes of their files, for the image."
            "$uv" pip compile --quiet --no-config --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
                --generate-hashes --no-annotate --no-header "${@:3}" "$1"
        } >"$made/lock"
        cp "$made/lock" "$2"
    }
    compile pyproject.toml requirements-image.lock --constraints requirements.lock
    compile launch/image-tools.in launch/image-tools.lock
}

command=${1:?one of build, push, run, print, pin-base, sbom, lock}
shift
if [[ -n ${REFERENCE:-} && $command =~ ^(run|sbom)$ ]]; then
    reference=$REFERENCE
elif [[ ! $command =~ ^(lock|pin-base)$ ]]; then
    read_revision
fi
[[ $command =~ ^(lock|print)$ ]] || find_engine
case $command in
    print) echo "$reference" ;;
    pin-base) pin_base ;;
    build | push | run | sbom | lock) "$command" "$@" ;;
    *) die "unknown command $command" ;;
esac
