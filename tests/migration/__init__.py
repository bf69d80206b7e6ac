"""Replace kube-proxy with kproxy and switch back, with the commands in docs/operations.md, under continuous traffic.

kubectl, the manifests, kproxy, its TLS connections and probes, the nodes' kernels and the packets are real. A stand-in
for the cluster implements what these commands need: `server.py` (the test API server with discovery, patches and
RBAC), `controllers.py` (DaemonSets), `kubelet.py` (Pods as processes) and `kube-proxy.yaml` (the objects that kubeadm
creates).

kube-proxy's own program is not available: its Pods run kproxy with kube-proxy's command line. The tests therefore cover
the commands and their order, the manifests, the configuration, RBAC, and that no request fails.
tests/kernel/test_takeover.py tests that kproxy takes over the rules of the real kube-proxy.
"""
