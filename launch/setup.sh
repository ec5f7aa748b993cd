#!/bin/sh
# Install packages into a virtual environment, which is created if it does not exist. `make setup` runs this script.
#
#   Usage     launch/setup.sh VENV [REQUIREMENT...]      pip reads the requirements: torch==2.13.0, -r FILE
#             launch/setup.sh --find                     print the Python that would be used
#   PYTHON    the Python of a new environment, 3.11 to 3.13; without it, the first of those in CANDIDATES is used
#
# pip reads its own variables: with PIP_INDEX_URL it installs from a mirror.
set -eu
# The tests run on 3.11 most often, so it comes first.
CANDIDATES="python3.11 python3.12 python3.13 python3"
mirror=https://pypi.tuna.tsinghua.edu.cn/simple

refuse() {
    echo "make setup: $1" >&2
    exit 78
}

# Print the version of a Python, such as 3.11; fails if it is not one that the packages are tried with.
version_of() {
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version="no Python"
    echo "$version"
    case $version in 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        found=$(version_of "$PYTHON") || refuse "PYTHON: '$PYTHON' is $found: expected Python 3.11, 3.12 or 3.13"
        echo "$PYTHON"
        return
    fi
    for name in $CANDIDATES; do
        if version_of "$name" >/dev/null; then
            echo "$name"
            return
        fi
    done
    refuse "none of $CANDIDATES is Python 3.11, 3.12 or 3.13: install one (Debian and Ubuntu: apt install python3 \
python3-venv; macOS: brew install python@3.12), or name it: make setup PYTHON=/path/to/python"
}

create() {
    system=$(uname -s)
    [ "$system" = Linux ] || echo "make setup: $system is not tried; it goes on, and deepspeed is built from source" >&2
    python=$(find_python)
    version=$(version_of "$python")
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        refuse "$python has no module venv: on Debian and Ubuntu, apt install python$version-venv"
    command -v openssl >/dev/null ||
        refuse "openssl is not on PATH, and the demo's server needs it (Debian and Ubuntu: apt install openssl)"
    echo "$venv: a new environment with Python $version ($(command -v "$python"))"
    "$python" -m venv "$venv"
}

venv=${1:?expected a folder for the environment, or --find}
shift
if [ "$venv" = --find ]; then
    find_python
    exit
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    create
elif [ -n "${PYTHON:-}" ]; then
    python=$(find_python)
    asked=$(version_of "$python")
    has=$(version_of "$venv/bin/python") || true
    [ "$asked" = "$has" ] || refuse "PYTHON: '$PYTHON' is Python $asked, but $venv has $has: delete $venv first (make clean)"
fi
[ $# -gt 0 ] || exit 0
began=$(date +%s)
"$venv/bin/python" -m pip install --disable-pip-version-check "$@" || refuse "pip could not install the packages: its \
own lines above say why. If it cannot reach the index or is slow, use a mirror: make setup PIP_INDEX_URL=$mirror"
echo "$venv: $(du -shL "$venv" | cut -f1) after $(($(date +%s) - began)) s"
