#!/bin/sh
# Install Amazon's EFA support while the image is built. The Dockerfile calls this script.
#
#   Usage   sh efa.sh VERSION     (with an empty VERSION it does nothing)
#
#   Variable   Meaning                       Default
#   EFA_FROM   address of the installer      https://efa-installer.amazonaws.com
#
# The installer needs Ubuntu. It installs libfabric and the plugin with which NCCL uses it (aws-ofi-nccl). The tests of
# this project cover only an image without EFA. With EFA, compare the line of `python -m job check` with the output of
# NCCL_DEBUG=INFO.
set -eu

version=${1:-}
[ -n "$version" ] || exit 0
from=${EFA_FROM:-https://efa-installer.amazonaws.com}/aws-efa-installer-$version.tar.gz

die() {
    echo "EFA_VERSION: $1" >&2
    exit 1
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -s /run/secrets/ca ]; then
    export SSL_CERT_FILE=/run/secrets/ca
fi
python3 - "$from" "$folder/installer.tar.gz" 2>"$folder/why" <<'END' ||
import shutil, sys, urllib.request

with urllib.request.urlopen(sys.argv[1], timeout=60) as answer, open(sys.argv[2], "wb") as file:
    shutil.copyfileobj(answer, file)
END
    die "$from cannot be fetched ($(tail -n 1 "$folder/why")): correct the version, or build on a machine that reaches it"
tar -xzf "$folder/installer.tar.gz" -C "$folder" || die "$from is not a tar.gz archive: correct the version"
apt-get update || die "apt cannot read the package lists that the installer needs, see above: try another --build-arg=APT_MIRROR=URL"
# The host provides the kernel module and the limits, and the check would need the hardware.
(cd "$folder/aws-efa-installer" && ./efa_installer.sh --yes --skip-kmod --skip-limit-conf --no-verify) ||
    die "the installer $version fails on this base image, see above: try another version"
plugin=$(find /opt/amazon -name 'libnccl-net*.so' -print | head -n 1)
[ -n "$plugin" ] || die "the installer $version contains no NCCL plugin: use a newer version"
dirname "$plugin" >/etc/ld.so.conf.d/efa-nccl.conf
ldconfig
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
