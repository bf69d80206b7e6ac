#!/bin/sh
# fresh.sh RELEASE CHECK...: run the README's commands on a minimal Debian.
#
# Each check gets a pristine root file system: debootstrap's minbase variant with git, make, python3 and python3-venv,
# and a clone of HEAD. It runs in new mount, PID, IPC and UTS namespaces with an empty environment. It shares the host's
# network, which it needs to install packages; the tests create network namespaces of their own.
#
# A check inherits from this machine only MIRROR, resolv.conf, the proxy variables and the certificate authorities in
# /usr/local/share/ca-certificates. build/fresh caches debootstrap's root file systems for a week.
#
#   demo    `make demo` as the only command
#   test    `make test` as the only command
#   short   `make demo` as an ordinary user, which names missing packages; as root `make demo` and part of `make test`
#   user    `make demo` as an ordinary user; as root the command that it prints; `make demo` and `make test` as the user
#   byhand  the commands in "Try it by hand" of docs/local.md, typed by an ordinary user with sudo
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

# Create the root file system that all checks of a release start from, unless a recent one is cached.
make_base() { # RELEASE
    base=$CACHE/$1.tar
    [ -z "$(find "$base" -newer "$0" -mtime "-$BASE_DAYS" 2>/dev/null)" ] || return 0
    echo "fresh: $1: creating a minimal root file system with debootstrap"
    confined debootstrap --variant=minbase --include="$PACKAGES" "$1" "$work/base" "$MIRROR" >"$CACHE/$1.log" 2>&1 ||
        fail "$1: debootstrap failed, see $CACHE/$1.log: $(tail -1 "$CACHE/$1.log")"
    rm -rf "$work"/base/var/cache/apt/archives/*.deb "$work"/base/var/lib/apt/lists/*
    tar -C "$work/base" -cf "$base.new" .
    mv "$base.new" "$base"
    rm -rf "$work/base"
}

# Unpack a pristine root file system, and add a clean clone and this machine's network configuration.
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

# Run a command in namespaces that vanish when this function returns or this script exits, with all processes and mounts:
# the first process of the PID namespace dies with unshare, and takes the others with it.
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

[ "$(id -u)" -eq 0 ] || fail "debootstrap and pivot_root require root: run \`sudo make fresh\`"
[ $# -ge 2 ] || fail "usage: fresh.sh RELEASE CHECK..."
release=$1
shift
for check in "$@"; do
    grep -q "^check_$check()" tests/fresh/checks.sh ||
        fail "unknown check \"$check\": choose from $(sed -n 's/^check_\([a-z]*\)().*/\1/p' tests/fresh/checks.sh | xargs)"
done
mkdir -p "$CACHE"
work=$(mktemp -d "$CACHE/run.XXXXXX")
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
[ -z "$(git status --porcelain)" ] || echo "fresh: ignoring uncommitted changes: the checks run on HEAD" >&2
make_base "$release"
for check in "$@"; do
    echo "fresh: $release: $check"
    start=$(date +%s)
    run_check "$release" "$check" || fail "$release: $check failed"
    echo "fresh: $release: $check ok, $(($(date +%s) - start)) s"
done
