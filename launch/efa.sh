#!/bin/sh
# Installs Amazon's EFA into an image that is being built: efa.sh VERSION; without a version it does nothing.
#
# Its installer brings libfabric and the plugin by which NCCL uses it (aws-ofi-nccl), and needs Ubuntu. It was never run
# in a test of this project, only its absence: compare its line of `python -m job check` with what NCCL_DEBUG=INFO says.
#
#   EFA_FROM   where the installer lies   https://efa-installer.amazonaws.com
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
    die "$from cannot be fetched ($(tail -n 1 "$folder/why")): correct the version, or build where it can be reached"
tar -xzf "$folder/installer.tar.gz" -C "$folder" || die "$from is no archive"
apt-get update || die "apt gives no lists of packages, which the installer needs"
# The kernel's module and its limits are the host's; what it would verify is the hardware.
(cd "$folder/aws-efa-installer" && ./efa_installer.sh --yes --skip-kmod --skip-limit-conf --no-verify) ||
    die "the installer $version does not install on this base, see above"
plugin=$(find /opt/amazon -name 'libnccl-net*.so' -print | head -n 1)
[ -n "$plugin" ] || die "the installer $version brings no plugin for NCCL: take a newer one"
dirname "$plugin" >/etc/ld.so.conf.d/efa-nccl.conf
ldconfig
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
