#!/bin/sh
# Installs packages of the distribution into an image that is being built: apt.sh PACKAGE...
#
#   APT_MIRROR   a mirror of the distribution's archive, as http://mirrors.tuna.tsinghua.edu.cn/ubuntu   the base's own
#   APT_FOLDER   the folder of apt's sources                                                            /etc/apt
#
# The base's release says which versions are installed; its archive keeps no old ones that could be pinned.
set -eu

mirror=${APT_MIRROR:-}
mirror=${mirror%/}
folder=${APT_FOLDER:-/etc/apt}

die() {
    echo "$1" >&2
    exit 1
}

case $mirror in
    *[!A-Za-z0-9._~:/%+-]*) die "APT_MIRROR: expected an address without a password, as http://mirrors.tuna.tsinghua.edu.cn/ubuntu" ;;
    '' | http://?*/?* | https://?*/?*) ;;
    *) die "APT_MIRROR: $mirror: expected http:// or https://, as http://mirrors.tuna.tsinghua.edu.cn/ubuntu" ;;
esac

# Nothing is taken from NVIDIA's own archive, so no build has to wait for it.
rm -f "$folder"/sources.list.d/cuda*.list "$folder"/sources.list.d/cuda*.sources
if [ -n "$mirror" ]; then
    for sources in "$folder"/sources.list "$folder"/sources.list.d/*.list "$folder"/sources.list.d/*.sources; do
        [ -f "$sources" ] || continue
        # Ubuntu's security updates are in the same folder of a mirror, Debian's in the one beside it.
        sed -i -E -e "/^ *#/!s#https?://[^ ]+/(ubuntu|ubuntu-ports|debian)/?( |\$)#$mirror\\2#g" \
            -e "/^ *#/!s#https?://[^ ]+/debian-security/?( |\$)#${mirror%/*}/debian-security\\1#g" "$sources"
        others=$(grep -E '^ *(deb|URIs:)' "$sources" | grep -Eo '[a-z+]+://[^ ]+' | grep -vF "${mirror%/*}/") || continue
        die "APT_MIRROR: $sources names $others, which is no archive of Ubuntu or Debian that it could stand for"
    done
fi

export DEBIAN_FRONTEND=noninteractive
options='-o Acquire::Retries=1 -o APT::Update::Error-Mode=any'
# Certificates of this place; the package that brings the usual ones may not be installed yet.
[ ! -s /run/secrets/ca ] || options="$options -o Acquire::https::CAInfo=/run/secrets/ca"
# shellcheck disable=SC2086  # several words
apt-get $options update ||
    die "apt: ${mirror:-the archive of the base} does not give its lists of packages, see above: name another --build-arg=APT_MIRROR=URL"
# shellcheck disable=SC2086
apt-get $options install --yes --no-install-recommends "$@" ||
    die "apt: ${mirror:-the archive of the base} does not give these packages, see above: name another --build-arg=APT_MIRROR=URL"
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
