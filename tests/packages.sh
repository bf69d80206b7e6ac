#!/bin/sh
# packages.sh tests|image|fresh|kernels: install missing Debian packages for the demo and the tests, `make image-test`,
# `make fresh` or `make kernels`. Run by an ordinary user, print the command that installs them, in one line.
#
# Environment:
#   PYTHON   interpreter of the virtual environment, python3 by default
set -u
PYTHON=${PYTHON:-python3}
# Most programs are in directories that are not in an ordinary user's PATH.
PATH=$PATH:${SBIN:-/usr/local/sbin:/usr/sbin:/sbin}

missing=""
need() { # PACKAGE COMMAND...: record the package as missing if the command fails
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}
program() { command -v "$1"; }
file() { [ -e "$1" ]; }
python() { "$PYTHON" -c "$1"; }

tests() {
    need iptables program iptables
    need iproute2 program ip
    need nftables program nft
    need conntrack program conntrack
    need ipset program ipset
    need util-linux program setpriv
    need iperf3 program iperf3 # throughput in the benchmark
    need mount program mount
    need openssl program openssl
    need curl program curl # tests of the README's commands and of scripts for Pods
    case ${PYTHON##*/} in
    python3.*) packaged=${PYTHON##*/} ;; # Debian packages each minor version separately
    *) packaged=python3 ;;
    esac
    need "$packaged" program "$PYTHON"
    need "$packaged-venv" python 'import ensurepip, venv'
    # pip compiles python-iptables, which has a C extension and no wheel on PyPI.
    [ -e .venv/.ready ] && return
    need gcc program "$(python 'import sysconfig; print(sysconfig.get_config_var("CC").split()[0])' 2>/dev/null || echo gcc)"
    need libc6-dev file /usr/include/stdio.h
    need "$packaged-dev" python 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'
}

image() {
    need buildah program buildah
    need debootstrap program debootstrap
    need runc program runc
    need openssl program openssl
    need golang-github-containers-common file /usr/share/containers/seccomp.json
}

fresh() {
    need debootstrap program debootstrap
    need debian-archive-keyring file /usr/share/keyrings/debian-archive-keyring.gpg
    need git program git
    need mount program mount
    need util-linux program unshare
}

kernels() {
    need qemu-system-x86 program qemu-system-x86_64
    need busybox-static file /bin/busybox
    need debian-archive-keyring file /usr/share/keyrings/debian-archive-keyring.gpg
    need apt program apt-get
    need dpkg program dpkg-deb
    need ipvsadm program ipvsadm
    need kmod program depmod
}

apt() {
    # Wait for unattended upgrades, which many machines run directly after their first boot.
    apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@"
}

case ${1-} in
tests | image | fresh | kernels) ;;
*) echo "usage: packages.sh tests|image|fresh|kernels" >&2 && exit 2 ;;
esac
"$1"
[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "missing packages (Debian names):$missing" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    as="as root " do=""
    ! command -v sudo >/dev/null 2>&1 || as="" do="sudo "
    echo "missing packages; install them ${as}with: ${do}apt-get update; ${do}apt-get install$missing" >&2
    exit 1
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
# A failing source, such as a third-party one that no longer exists, does not affect the others.
apt update || echo "apt-get update failed for at least one source; using the others" >&2
# shellcheck disable=SC2086 # a list of words
apt -y install --no-install-recommends $missing >/dev/null || exit 1
missing=""
"$1"
[ -z "$missing" ] || { echo "still missing after installation:$missing" >&2; exit 1; }
