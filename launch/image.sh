#!/usr/bin/env bash
# What the Makefile does with the image: launch/image.sh build | push | run [WORD...] | print | pin-base | sbom | lock
#
#   REGISTRY    where it is pushed to                                   registry.example.com
#   IMAGE       its name there                                          wikillm
#   TAG         its tag                                                 the git revision; changes of what is in it are refused
#   REVISION    what a source without git is called, as v1.0            none: it is asked for
#   REFERENCE   another image for `run` and `sbom`, as name@digest      $REGISTRY/$IMAGE:$TAG
#   PLATFORM    what it is built for                                    linux/amd64
#   ENGINE      docker or podman                                        the one that answers
#   CA_BUNDLE   certificates to trust while building, never kept        SSL_CERT_FILE, if set
#   NETRC       credentials of a package index, never kept              none
#   BUILD_ARGS  more words for the build, as --build-arg=INDEX_URL=...  none (docs/image.md lists the arguments)
#   PUSH_ARGS   more words for podman's push, as --tls-verify=false     none
#   RUN_ARGS    more words for `run`, as --volume=/data:/data:ro        none
#   SCRATCH     volume or folder for caches when it runs                wikillm-scratch
#
# In China, with mirrors of the base, of its distribution's packages and of the package index:
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
export DOCKER_BUILDKIT=1 BUILDAH_FORMAT=docker

die() {
    echo "$1" >&2
    exit 2
}

# What decides what is in the image: how it is built, and what .dockerignore lets in. Launch specs and settings that are not
# named there are mounted or applied, so a change of theirs leaves the revision true.
list_inputs() {
    printf '%s\n' Dockerfile .dockerignore launch/image.sh
    sed -n 's/^!//p' .dockerignore
}

# The changes since the commit that a build would take in, as `git status` has them; ignored code would be taken in as well.
list_changes() {
    list_inputs | xargs git -c core.quotePath=false status --porcelain --untracked-files=no -- | cut -c4-
    list_inputs | grep -v '^job' | xargs git ls-files --others --
    git -c core.quotePath=false ls-files --others -- job | grep -Ev '(^|/)(\.|__pycache__/)' | grep -E '(\.py|/)"?$' || true
}

# The revision that the image says it is made from; the first characters of a commit are the tag.
read_revision() {
    local changes given=${REVISION:-}
    if [[ -e .git ]]; then
        revision=$(git rev-parse HEAD) || die "git names no commit of this checkout: commit first, or see what git says above"
        [[ -z $given || $(git rev-parse --verify --quiet "$given^{commit}") == "$revision" ]] ||
            die "REVISION: $given is not what is checked out here, $revision: leave it out, git tells it"
        changes=$(list_changes)
        if [[ $changes ]]; then
            [[ ${ALLOW_DIRTY:-} == 1 ]] ||
                die "not committed, but part of the image: $(summary "$changes"): commit them, or say ALLOW_DIRTY=1"
            revision+=-dirty
        fi
    elif [[ -z $given ]]; then
        die "no git checkout, so say what this source is, a commit or a version: REVISION=v1.0 make ${command/print/print-image}"
    elif [[ ! $given =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$ ]]; then
        die "REVISION: '$given': expected a commit or a version of letters, digits, dots, dashes and underscores, as v1.0"
    else
        revision=$given
    fi
    [[ $revision =~ ^[0-9a-f]{40} ]] && TAG=${TAG:-${revision:0:12}${revision:40}}
    TAG=${TAG:-$revision}
    reference=$REGISTRY/$IMAGE:$TAG
}

# The first three of several lines, and how many more there are.
summary() {
    local count
    count=$(wc -l <<<"$1")
    head -n 3 <<<"$1" | paste -sd ' ' | tr -d '\n'
    ((count <= 3)) || printf ' and %d more' "$((count - 3))"
}

# Settings of a user's own, which are mounted where the image runs.
name_left_out() {
    local config left=
    for config in configs/*.yaml; do
        [[ ! -e $config ]] || grep -qxF "!$config" .dockerignore || left+=" $config"
    done
    [[ -z $left ]] || echo "left out of the image:$left: .dockerignore does not name them; they are mounted when it runs" >&2
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
    local words=() version source=unpublished created
    [[ ${BUILD_ARGS:-} =~ ://[^/[:space:]]*@ ]] &&
        die "BUILD_ARGS: holds a user or password in a URL, which the image's history would keep: give NETRC=FILE"
    version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)
    created=$(date -u +%FT%TZ)
    if [[ -e .git ]]; then
        created=$(git log -1 --format=%cI)
        source=$(git remote get-url origin 2>/dev/null | sed 's#//[^/]*@#//#') || source=unpublished
    fi
    name_left_out
    [[ -n $CA_BUNDLE ]] && words+=(--secret "id=ca,src=$CA_BUNDLE")
    [[ -n ${NETRC:-} ]] && words+=(--secret "id=netrc,src=$NETRC")
    # shellcheck disable=SC2206  # several words
    words+=(${BUILD_ARGS:-})
    "$engine" build --file "$DOCKERFILE" --platform "$PLATFORM" --tag "$reference" \
        --build-arg "REVISION=$revision" --build-arg "VERSION=$version" --build-arg "SOURCE=$source" \
        --build-arg "CREATED=$created" "${words[@]}" .
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

# As strict as the strictest cluster: no root, no capability, nothing written but /tmp and the scratch volume. The settings
# are those of this folder, as on a cluster; InfiniBand's devices need memory that stays where it is.
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
    # shellcheck disable=SC2206  # several words
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

# Hashes of every file of the versions in requirements.lock, for the base's Python: torch is the index's own, with CUDA.
# ModelScope's reader is 48 MB in five packages, in an image that has no pip to add it.
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
    compile pyproject.toml requirements-image.lock --constraints requirements.lock --extra modelscope
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
