#!/bin/sh
# Install the Debian packages that demo and tests run on, as root; as anybody else, name those that are missing.
set -u
missing=""
need() { # COMMAND PACKAGE
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need iptables iptables
need ip iproute2
need nft nftables
need conntrack conntrack
need ipset ipset
need setpriv util-linux
need mount mount
python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || missing="$missing python3-venv"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" -ne 0 ]; then
    echo "missing packages, install them with: sudo apt-get install$missing"
    exit 1
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "missing commands, please install what is called in Debian:$missing"
    exit 1
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # a list of words
apt-get -qq -o=Dpkg::Use-Pty=0 update && apt-get -qq -y -o=Dpkg::Use-Pty=0 install --no-install-recommends $missing >/dev/null
