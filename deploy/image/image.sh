#!/bin/sh
# image.sh build IMAGE [BASE]   build the container image
# image.sh base BASE            build a base image with debootstrap, without a registry
# image.sh save IMAGE FILE      write the image to an archive for `kind load image-archive`
# image.sh trial BASE           build the base image if missing, build on it, and run tests/deploy/test_image.py
#
# Environment:
#   ENGINE   docker, podman or buildah; the first one that works by default
#   MIRROR   Debian mirror for the base image
set -eu
cd "$(dirname "$0")/../.."

engine() {
    for candidate in ${ENGINE:-docker podman buildah}; do
        if "$candidate" info >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "image.sh: no working container engine: install ${ENGINE:-docker, podman or buildah} (as root: apt-get install buildah)" >&2
    exit 1
}

build() { # IMAGE [BASE]
    set -- "$1" ${2:+--build-arg "BASE=$2"}
    image=$1
    shift
    if [ "$engine" = docker ]; then
        DOCKER_BUILDKIT=1 docker build "$@" -t "$image" .
    else
        # The image format that all kubelets and `kind load` accept.
        "$engine" build --layers --format=docker "$@" -t "$image" .
    fi
}

# Build a minimal Debian like `debian:bookworm-slim`, with this machine's additional certificate authorities.
base() { # BASE
    command -v debootstrap >/dev/null || { echo "image.sh: debootstrap not found: run apt-get install debootstrap as root" >&2; exit 1; }
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT INT TERM
    debootstrap --variant=minbase bookworm "$folder/root" "${MIRROR:-http://deb.debian.org/debian}" >"$folder/log" 2>&1 ||
        { tail -5 "$folder/log" >&2; exit 1; }
    rm -rf "$folder/root/var/cache/apt/archives" "$folder"/root/var/lib/apt/lists/*
    if [ -d /usr/local/share/ca-certificates ]; then
        mkdir -p "$folder/root/usr/local/share"
        cp -R /usr/local/share/ca-certificates "$folder/root/usr/local/share/"
    fi
    case $engine in
    buildah)
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$folder/root" /
        buildah commit --quiet --rm "$container" "$1"
        ;;
    *) tar -C "$folder/root" -c . | "$engine" import - "$1" ;;
    esac
    rm -rf "$folder"
    trap - EXIT INT TERM
}

save() { # IMAGE FILE
    mkdir -p "$(dirname "$2")"
    rm -f "$2"
    case $engine in
    buildah) buildah push --quiet "$1" "docker-archive:$2:$1" ;;
    *) "$engine" save -o "$2" "$1" ;;
    esac
}

trial() { # BASE
    image=localhost/kproxy:trial
    [ "$engine" = buildah ] || { echo "image.sh: make image-test requires buildah: set ENGINE=buildah" >&2; exit 1; }
    buildah inspect --type=image "$1" >/dev/null 2>&1 || base "$1"
    BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
    export BUILDAH_ISOLATION
    build "$image" "$1"
    container=$(buildah from "$image")
    trap 'buildah rm "$container" >/dev/null' EXIT
    KPROXY_IMAGE_ROOT=$(buildah mount "$container") "$RUN" -m pytest -q -rA tests/deploy/test_image.py
}

engine=$(engine)
what=$1
shift
"$what" "$@"
