#!/bin/sh
# Install packages of the distribution while the image is built. The Dockerfile calls this script.
#
#   Usage   sh apt.sh PACKAGE...
#
#   Variable     Meaning                                                                                     Default
#   APT_MIRROR   mirror of the distribution's archive, such as http://mirrors.tuna.tsinghua.edu.cn/ubuntu   the base's
#   APT_FOLDER   folder with apt's sources                                                                   /etc/apt
#
# The base image's release decides the versions. They are not pinned, because the archive deletes old versions.
set -eu

mirror=${APT_MIRROR:-}
mirror=${mirror%/}
folder=${APT_FOLDER:-/etc/apt}

die() {
    echo "$1" >&2
    exit 1
}

case $mirror in
    *[!A-Za-z0-9._~:/%+-]*) die "APT_MIRROR: expected an address without a password, such as http://mirrors.tuna.tsinghua.edu.cn/ubuntu" ;;
    '' | http://?*/?* | https://?*/?*) ;;
    *) die "APT_MIRROR: $mirror: expected http://HOST/PATH or https://HOST/PATH, such as http://mirrors.tuna.tsinghua.edu.cn/ubuntu" ;;
esac

# Remove NVIDIA's archive: no package comes from it, so the build must not wait for it.
rm -f "$folder"/sources.list.d/cuda*.list "$folder"/sources.list.d/cuda*.sources
if [ -n "$mirror" ]; then
    for sources in "$folder"/sources.list "$folder"/sources.list.d/*.list "$folder"/sources.list.d/*.sources; do
        [ -f "$sources" ] || continue
        # On a mirror, Ubuntu's security updates are in the same folder, and Debian's are in the folder beside it.
        sed -i -E -e "/^ *#/!s#https?://[^ ]+/(ubuntu|ubuntu-ports|debian)/?( |\$)#$mirror\\2#g" \
            -e "/^ *#/!s#https?://[^ ]+/debian-security/?( |\$)#${mirror%/*}/debian-security\\1#g" "$sources"
        others=$(grep -E '^ *(deb|URIs:)' "$sources" | grep -Eo '[a-z+]+://[^ ]+' | grep -vF "${mirror%/*}/") || continue
        die "APT_MIRROR: $sources also uses $others, which is not an archive of Ubuntu or Debian: remove it from the base image"
    done
fi

export DEBIAN_FRONTEND=noninteractive
options='-o Acquire::Retries=1 -o APT::Update::Error-Mode=any'
# Use the site's certificates, because the package with the usual certificates may not be installed yet.
[ ! -s /run/secrets/ca ] || options="$options -o Acquire::https::CAInfo=/run/secrets/ca"
# shellcheck disable=SC2086  # $options holds several words.
apt-get $options update ||
    die "apt: cannot read the package lists of ${mirror:-the archive of the base image}, see above: try another --build-arg=APT_MIRROR=URL"
# shellcheck disable=SC2086
apt-get $options install --yes --no-install-recommends "$@" ||
    die "apt: cannot install packages from ${mirror:-the archive of the base image}, see above: try another --build-arg=APT_MIRROR=URL"
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
