#!/bin/sh
# kind.sh up IMAGE   create a kind cluster from kind-config.yaml, with kproxy as its only service proxy, or update it
# kind.sh down       delete the cluster
#
# Environment:
#   MODE         kproxy's proxy mode, iptables or nftables; that of deploy/overlays/kind/config.conf by default
#   NODE_IMAGE   image of the nodes, which selects the Kubernetes version of a new cluster; kind's own by default
#   ENGINE       see deploy/image/image.sh
set -eu
cd "$(dirname "$0")/.."
NAME=kproxy
KUBECONFIG=$PWD/build/kind.kubeconfig # leaves the user's own kubeconfig alone
export KUBECONFIG

need() { # PROGRAM...
    for program in "$@"; do
        command -v "$program" >/dev/null 2>&1 || { echo "kind.sh: $program not found" >&2; exit 1; }
    done
}

up() { # IMAGE
    need kind kubectl
    mkdir -p build
    configure
    sh deploy/image/image.sh build "$1"
    sh deploy/image/image.sh save "$1" build/image.tar
    kind get clusters 2>/dev/null | grep -qx "$NAME" ||
        kind create cluster --name "$NAME" --config kind-config.yaml ${NODE_IMAGE:+--image "$NODE_IMAGE"}
    kind export kubeconfig --name "$NAME"
    kind load image-archive build/image.tar --name "$NAME"
    kubectl apply -k build/kind
    # The tag does not change between builds, so a new image alone does not roll out.
    kubectl -n kube-system rollout restart daemonset/kproxy
    kubectl -n kube-system rollout status daemonset/kproxy --timeout=10m
    kubectl wait --for=condition=Ready nodes --all --timeout=5m
    kubectl -n kube-system rollout status deployment/coredns --timeout=5m
    kubectl get nodes -o wide
    echo "KUBECONFIG=$KUBECONFIG"
}

# Write build/kind, a kustomization of the overlay with the selected proxy mode.
configure() {
    case ${MODE:=$(sed -n 's/^mode: //p' deploy/overlays/kind/config.conf)} in
    iptables | nftables) ;;
    *) echo "kind.sh: MODE must be iptables or nftables, not \"$MODE\"" >&2; exit 1 ;;
    esac
    mkdir -p build/kind
    sed "s/^mode: .*/mode: $MODE/" deploy/overlays/kind/config.conf >build/kind/config.conf
    cat >build/kind/kustomization.yaml <<END
resources: [../../deploy/overlays/kind]
configMapGenerator: [{name: kproxy, namespace: kube-system, behavior: merge, files: [config.conf]}]
END
}

down() {
    need kind
    kind delete cluster --name "$NAME"
}

case ${1-} in
up) [ $# -eq 2 ] ;;
down) [ $# -eq 1 ] ;;
*) false ;;
esac || { echo "usage: kind.sh up IMAGE | down" >&2; exit 2; }
"$@"
