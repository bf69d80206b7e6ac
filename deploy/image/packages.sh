#!/bin/sh
# Install the Debian packages that `make image-test` runs on, as root; as anybody else, name those that are missing.
set -eu
missing=""
need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need buildah buildah
need debootstrap debootstrap
need runc runc
need openssl openssl
[ -e /usr/share/containers/seccomp.json ] || missing="$missing golang-github-containers-common"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "missing packages, install them with: sudo apt-get install$missing" >&2
    exit 1
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # a list of words
apt-get -qq update && apt-get -qq install -y --no-install-recommends $missing >/dev/null
