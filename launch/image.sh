#!/usr/bin/env bash
# Build, push and run the image. The targets of the Makefile call this script.
#
#   Usage   launch/image.sh build | push | run [WORD...] | print | pin-base | sbom | lock
#
#   Variable    Meaning                                                        Default
#   REGISTRY    registry to push to                                            registry.example.com
#   IMAGE       name of the image in the registry                              wikillm
#   TAG         tag of the image                                               the git revision (uncommitted changes are refused)
#   REVISION    revision of a source without git, such as v1.0                 none: then it is required
#   REFERENCE   another image for `run` and `sbom`, such as name@digest        $REGISTRY/$IMAGE:$TAG
#   CUDA        13; or 12, for drivers below 580 and for V100           13
#   PLATFORM    platform of the image                                          linux/amd64
#   ENGINE      docker or podman                                               the first one that answers
#   CA_BUNDLE   certificates for the build, not kept in the image              SSL_CERT_FILE, if set
#   NETRC       credentials of a package index, not kept in the image          none
#   BUILD_ARGS  more options for the build, such as --build-arg=INDEX_URL=...  none (docs/image.md lists the arguments)
#   PUSH_ARGS   more options for podman's push, such as --tls-verify=false     none
#   RUN_ARGS    more options for `run`, such as --volume=/data:/data:ro        none
#   SCRATCH     volume or folder for caches at run time                        wikillm-scratch
#
# In China, use mirrors of the base image, of its distribution's packages and of the package index:
#   make build BUILD_ARGS="--build-arg=BASE_IMAGE=docker.m.daocloud.io/nvidia/cuda:13.0.2-base-ubuntu24.04 \
#     --build-arg=APT_MIRROR=http://mirrors.tuna.tsinghua.edu.cn/ubuntu --build-arg=INDEX_URL=https://pypi.tuna.tsinghua.edu.cn/simple"
set -euo pipefail
cd "$(dirname "$0")/.."

REGISTRY=${REGISTRY:-registry.example.com}
IMAGE=${IMAGE:-wikillm}
PLATFORM=${PLATFORM:-linux/amd64}
CA_BUNDLE=${CA_BUNDLE:-${SSL_CERT_FILE:-}}
DOCKERFILE=${DOCKERFILE:-Dockerfile}
PUSHED=build/image-pushed
CUDA=${CUDA:-13}
# For CUDA=12. torch's builds for CUDA 12.6 are the last ones with code for V100, and only PyTorch's own index has them.
BASE_OF_CUDA_12=nvidia/cuda:12.6.3-base-ubuntu24.04
TORCH_BUILD_OF_CUDA_12=cu126
INDEX_OF_CUDA_12=https://download.pytorch.org/whl/$TORCH_BUILD_OF_CUDA_12
export DOCKER_BUILDKIT=1 BUILDAH_FORMAT=docker

die() {
    echo "$1" >&2
    exit 2
}

# List the files that decide the content of the image: how it is built, and what .dockerignore includes. Other launch
# specs and settings are mounted or applied, so they may change without changing the revision.
list_inputs() {
    printf '%s\n' Dockerfile .dockerignore launch/image.sh
    sed -n 's/^!//p' .dockerignore
}

# List the uncommitted changes that a build would include, as `git status` shows them, and code that git ignores, which a
# build would include too.
list_changes() {
    list_inputs | xargs git -c core.quotePath=false status --porcelain --untracked-files=no -- | cut -c4-
    list_inputs | grep -v '^job' | xargs git ls-files --others --
    git -c core.quotePath=false ls-files --others -- job | grep -Ev '(^|/)(\.|__pycache__/)' | grep -E '(\.py|/)"?$' || true
}

# Set `revision`, which the image records as its source, and `reference`. The tag is the start of the commit's hash, and
# names CUDA 12.
read_revision() {
    local changes given=${REVISION:-}
    if [[ -e .git ]]; then
        revision=$(git rev-parse HEAD) || die "git finds no commit in this checkout: commit first, or see git's message above"
        [[ -z $given || $(git rev-parse --verify --quiet "$given^{commit}") == "$revision" ]] ||
            die "REVISION: $given is not the commit checked out here, $revision: leave REVISION out, because git provides it"
        changes=$(list_changes)
        if [[ $changes ]]; then
            [[ ${ALLOW_DIRTY:-} == 1 ]] ||
                die "not committed, but part of the image: $(summary "$changes"): commit them, or set ALLOW_DIRTY=1"
            revision+=-dirty
        fi
    elif [[ -z $given ]]; then
        die "REVISION: not set, but a source without git needs it: give a commit or version: REVISION=v1.0 make ${command/print/print-image}"
    elif [[ ! $given =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$ ]]; then
        die "REVISION: '$given': expected a commit or a version of letters, digits, dots, dashes and underscores, such as v1.0"
    else
        revision=$given
    fi
    local short=$revision
    [[ $revision =~ ^[0-9a-f]{40} ]] && short=${revision:0:12}${revision:40}
    [[ $CUDA == 12 ]] && short+=-$TORCH_BUILD_OF_CUDA_12
    TAG=${TAG:-$short}
    reference=$REGISTRY/$IMAGE:$TAG
}

# Print the first three of several lines, and the number of the others.
summary() {
    local count
    count=$(wc -l <<<"$1")
    head -n 3 <<<"$1" | paste -sd ' ' | tr -d '\n'
    ((count <= 3)) || printf ' and %d more' "$((count - 3))"
}

# Warn about settings files that are not part of the image. They are mounted when it runs.
warn_left_out() {
    local config left=
    for config in configs/*.yaml; do
        [[ ! -e $config ]] || grep -qxF "!$config" .dockerignore || left+=" $config"
    done
    [[ -z $left ]] || echo "not in the image:$left: .dockerignore does not list them; they are mounted when it runs" >&2
}

find_engine() {
    local candidate
    for candidate in ${ENGINE:-docker podman}; do
        if "$candidate" info >/dev/null 2>&1; then
            engine=$candidate
            return
        fi
    done
    die "ENGINE: no answer from ${ENGINE:-docker or podman}: check that it is installed and that its daemon runs"
}

is_podman() { [[ ${engine##*/} == podman* ]]; }

build() {
    local words=() version source=unpublished created torch
    [[ ${BUILD_ARGS:-} =~ ://[^/[:space:]]*@ ]] &&
        die "BUILD_ARGS: contains a user or password in a URL, which the image's history would keep: use NETRC=FILE"
    version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)
    created=$(date -u +%FT%TZ)
    if [[ -e .git ]]; then
        created=$(git log -1 --format=%cI)
        source=$(git remote get-url origin 2>/dev/null | sed 's#//[^/]*@#//#') || source=unpublished
    fi
    warn_left_out
    [[ -n $CA_BUNDLE ]] && words+=(--secret "id=ca,src=$CA_BUNDLE")
    [[ -n ${NETRC:-} ]] && words+=(--secret "id=netrc,src=$NETRC")
    if [[ $CUDA == 12 ]]; then
        torch=$(grep -o '^torch==[^ +]*' requirements-image.lock) || die "requirements-image.lock: has no line torch==..."
        words+=(
            --build-arg "BASE_IMAGE=$BASE_OF_CUDA_12"
            --build-arg "TORCH=$torch+$TORCH_BUILD_OF_CUDA_12"
            --build-arg "TORCH_INDEX=$INDEX_OF_CUDA_12"
        )
    fi
    # BUILD_ARGS comes last, so it may replace each of these. It holds several words.
    # shellcheck disable=SC2206
    words+=(${BUILD_ARGS:-})
    "$engine" build --file "$DOCKERFILE" --platform "$PLATFORM" --tag "$reference" \
        --build-arg "REVISION=$revision" --build-arg "VERSION=$version" --build-arg "SOURCE=$source" \
        --build-arg "CREATED=$created" "${words[@]}" .
    "$engine" image inspect --format '{{.Size}}' "$reference" | awk -v name="$reference" '{ printf "%s: %.2f GB\n", name, $1 / 1e9 }'
}

# Print the digest of the pushed image. A digest always names the same bytes, but a tag may be pushed again.
push() {
    local digest
    mkdir -p build
    if is_podman; then
        # shellcheck disable=SC2086  # PUSH_ARGS holds several words.
        "$engine" push ${PUSH_ARGS:-} --digestfile "$PUSHED.digest" "$reference"
        digest=$(<"$PUSHED.digest")
        rm "$PUSHED.digest"
    else
        digest=$("$engine" push "$reference" | tee /dev/stderr | sed -n 's/.* digest: \(sha256:[0-9a-f]*\).*/\1/p')
    fi
    echo "$REGISTRY/$IMAGE@$digest" | tee "$PUSHED"
}

# Run the image with the restrictions of a strict cluster: no root, no capabilities, and only /tmp and the scratch volume
# are writable. As on a cluster, the settings are mounted from this folder. InfiniBand devices need locked memory.
run() {
    local words=() name
    for name in AWS_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_DEFAULT_REGION \
        SWANLAB_API_KEY HF_ENDPOINT HF_TOKEN; do
        [[ -n ${!name:-} ]] && words+=(--env "$name")
    done
    if command -v nvidia-smi >/dev/null; then
        if is_podman; then words+=(--device nvidia.com/gpu=all); else words+=(--gpus all); fi
    fi
    [[ -d /dev/infiniband ]] && words+=(--device /dev/infiniband --ulimit memlock=-1)
    # shellcheck disable=SC2206  # RUN_ARGS holds several words.
    words+=(${RUN_ARGS:-})
    exec "$engine" run --rm --network host --read-only --tmpfs /tmp --shm-size 8g \
        --volume "${SCRATCH:-wikillm-scratch}:/scratch" --volume "$PWD/configs:/app/configs:ro,z" --cap-drop ALL --security-opt no-new-privileges \
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

# Write the image's lock files: the versions of the two other lock files with the hashes of all their files, for the base's
# Python. torch is the index's CUDA build. ModelScope's reader (48 MB in five packages) and TensorBoard (57 MB in six) are
# included, because the image has no pip to install them later.
lock() {
    local made uv
    made=$(mktemp -d)
    # shellcheck disable=SC2064  # The folder's name must be expanded now.
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
    compile pyproject.toml requirements-image.lock --constraints requirements.lock --constraints requirements-dev.lock \
        --extra modelscope --extra tensorboard
    compile launch/image-tools.in launch/image-tools.lock
}

command=${1:?expected a command: build, push, run, print, pin-base, sbom or lock}
shift
[[ $CUDA =~ ^1[23]$ ]] || die "CUDA: '$CUDA': expected 13, or 12 for drivers below 580 and for V100"
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
    *) die "unknown command $command: expected build, push, run, print, pin-base, sbom or lock" ;;
esac
