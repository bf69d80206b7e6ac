#!/bin/sh
# fresh.sh RELEASE CHECK...: run README's commands on a fresh, minimal Debian.
#
# Each check gets a pristine root of its own: debootstrap's minbase with git, make, python3 and python3-venv, and a clone
# of HEAD. It runs there in new mount, PID, IPC and UTS namespaces with an empty environment. The network is the host's,
# because packages come from there; the tests make their own network namespaces.
#
# From this machine come only the mirror's address (MIRROR), its resolv.conf, proxy variables, and the certificate
# authorities in /usr/local/share/ca-certificates. The roots as debootstrap leaves them are kept in build/fresh for a week.
#
#   demo    `make demo` as the first and only command
#   test    `make test` as the first and only command
#   short   as an ordinary user `make demo`, which names what is missing; as root `make demo`, then a part of `make test`
#   user    an ordinary user: `make demo`, the command that it names as root, `make demo` and `make test` again
#   byhand  the commands of the section "Try it by hand" of docs/local.md, typed by an ordinary user with sudo
set -eu
cd "$(dirname "$0")/../.."
MIRROR=${MIRROR:-http://deb.debian.org/debian}
CACHE=$PWD/build/fresh
PACKAGES=git,make,python3,python3-venv
BASE_DAYS=7
AUTHORITIES=/usr/local/share/ca-certificates

fail() {
    echo "fresh: $*" >&2
    exit 1
}

# Make the root that every check of a release starts from, unless a recent one is there.
make_base() { # RELEASE
    base=$CACHE/$1.tar
    [ -z "$(find "$base" -newer "$0" -mtime "-$BASE_DAYS" 2>/dev/null)" ] || return 0
    echo "fresh: $1: making a minimal root with debootstrap"
    confined debootstrap --variant=minbase --include="$PACKAGES" "$1" "$work/base" "$MIRROR" >"$CACHE/$1.log" 2>&1 ||
        fail "$1: debootstrap failed, see $CACHE/$1.log: $(tail -1 "$CACHE/$1.log")"
    rm -rf "$work"/base/var/cache/apt/archives/*.deb "$work"/base/var/lib/apt/lists/*
    tar -C "$work/base" -cf "$base.new" .
    mv "$base.new" "$base"
    rm -rf "$work/base"
}

# Unpack a pristine root, with a clean clone and what no machine reaches its mirrors without here.
make_root() { # RELEASE ROOT
    mkdir "$2"
    tar -C "$2" -xf "$CACHE/$1.tar"
    git clone --quiet --no-hardlinks . "$2/root/kproxy"
    cp /etc/resolv.conf "$2/etc/resolv.conf"
    printf '127.0.0.1 localhost fresh\n::1 localhost\n' >"$2/etc/hosts"
    echo fresh >"$2/etc/hostname"
    if [ -d "$AUTHORITIES" ]; then
        mkdir -p "$2$AUTHORITIES"
        cp -R "$AUTHORITIES/." "$2$AUTHORITIES/"
    fi
    mkdir "$2/fresh"
    cp tests/fresh/inside.sh tests/fresh/checks.sh "$2/fresh/"
}

run_check() { # RELEASE CHECK
    root=$work/$1-$2
    make_root "$1" "$root"
    status=0
    confined env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
        ${http_proxy:+"http_proxy=$http_proxy"} ${https_proxy:+"https_proxy=$https_proxy"} ${no_proxy:+"no_proxy=$no_proxy"} \
        sh "$root/fresh/inside.sh" "$root" "$2" || status=$?
    rm -rf --one-file-system "$root"
    return "$status"
}

# Run a command whose processes and mounts are gone when this returns, or when this script ends: the PID namespace ends
# with its first process, which dies with unshare.
confined() { # COMMAND...
    unshare --mount --pid --ipc --uts --fork --kill-child "$@" </dev/null &
    running=$!
    ended=0
    wait "$running" || ended=$?
    running=
    return "$ended"
}

clean_up() {
    trap '' INT TERM HUP
    if [ -n "${running:-}" ]; then
        kill -KILL "$running" 2>/dev/null || true
        wait "$running" 2>/dev/null || true
    fi
    rm -rf --one-file-system "$work"
}

[ "$(id -u)" -eq 0 ] || fail "debootstrap and chroot need root: run \`sudo make fresh\`"
[ $# -ge 2 ] || fail "usage: fresh.sh RELEASE CHECK..."
release=$1
shift
for check in "$@"; do
    grep -q "^check_$check()" tests/fresh/checks.sh ||
        fail "there is no check \"$check\": choose from $(sed -n 's/^check_\([a-z]*\)().*/\1/p' tests/fresh/checks.sh | xargs)"
done
mkdir -p "$CACHE"
work=$(mktemp -d "$CACHE/run.XXXXXX")
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
[ -z "$(git status --porcelain)" ] || echo "fresh: uncommitted changes are left out: HEAD is what is checked" >&2
make_base "$release"
for check in "$@"; do
    echo "fresh: $release: $check"
    start=$(date +%s)
    run_check "$release" "$check" || fail "$release: $check failed"
    echo "fresh: $release: $check ok, $(($(date +%s) - start)) s"
done
