#!/bin/sh
# Install the locked packages into /opt/venv. The Dockerfile runs this script.
#
#   Usage   install.sh LOCK [TORCH TORCH_INDEX]
#
# LOCK has the hash of every file. With TORCH, such as torch==2.13.0+cu126, the lock's torch and its CUDA packages are left
# out, and that build is installed from TORCH_INDEX instead. Its CUDA packages are those that torch itself requires, by
# exact version. No hash protects these files, only the connection to TORCH_INDEX: a lock with the hashes can be given by
# the build argument LOCK.
set -eu
lock=$1 torch=${2:-} index=${3:-}
uv=${UV:-/opt/tools/bin/uv} venv=${VENV:-/opt/venv}

install() {
    "$uv" pip install --no-config --python "$venv" --link-mode copy --compile-bytecode "$@"
}

if [ -n "$torch" ]; then
    [ -n "$index" ] || { echo "TORCH_INDEX: not set, but TORCH is: give the package index that has $torch" >&2; exit 1; }
    rest=$(mktemp)
    # A requirement begins at the start of a line, and its hashes follow on indented lines.
    awk '/^[^ \t#]/ { out = /^(torch|triton)==|^(cuda|nvidia)-/ && !/^nvidia-ml-py==/ } !out' "$lock" >"$rest"
    lock=$rest
fi
install --index-url "${INDEX_URL:-https://pypi.org/simple}" --find-links "${WHEELS_FOLDER:-/wheels}" \
    --no-deps --require-hashes --build-constraints "$lock" -r "$lock"
[ -z "$torch" ] || install --index-url "$index" --constraints "$lock" "$torch"
"$uv" pip check --no-config --python "$venv"
