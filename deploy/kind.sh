#!/bin/sh
# kind.sh up IMAGE | down: a cluster of kind's without kube-proxy (kind-config.yaml), and kproxy as its only proxy.
set -eu
cd "$(dirname "$0")/.."
NAME=kproxy
KUBECONFIG=$PWD/build/kind.kubeconfig # not yours: nothing else is touched by a mistake
export KUBECONFIG

need() {
    for program in "$@"; do
        command -v "$program" >/dev/null 2>&1 || { echo "$program is needed and not found" >&2; exit 1; }
    done
}

up() { # IMAGE
    need kind kubectl
    mkdir -p build
    sh deploy/image/image.sh build "$1"
    sh deploy/image/image.sh save "$1" build/image.tar
    kind get clusters 2>/dev/null | grep -qx "$NAME" || kind create cluster --name "$NAME" --config kind-config.yaml
    kind export kubeconfig --name "$NAME"
    kind load image-archive build/image.tar --name "$NAME"
    kubectl apply -k deploy/overlays/kind
    # The image's tag stays the same from build to build.
    kubectl -n kube-system rollout restart daemonset/kproxy
    kubectl -n kube-system rollout status daemonset/kproxy --timeout=10m
    kubectl wait --for=condition=Ready nodes --all --timeout=5m
    kubectl -n kube-system rollout status deployment/coredns --timeout=5m
    kubectl get nodes -o wide
    echo "KUBECONFIG=$KUBECONFIG"
}

down() {
    need kind
    kind delete cluster --name "$NAME"
}

"$@"
