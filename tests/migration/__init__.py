"""The way into kube-proxy's place and back, walked with the commands of docs/operations.md as they stand.

kubectl is the real one, and so are manifests, kproxy, its HTTPS, its probes, the nodes' kernels and the packets. The
cluster is a stand-in, as far as these commands reach: `server.py` (the test API server with what kubectl wants, and
RBAC), `controllers.py` (DaemonSets), `kubelet.py` (Pods as processes), `kube-proxy.yaml` (what kubeadm leaves).

kube-proxy's own program is not here: kproxy runs in its Pods, with its command line. So what is proved is the commands,
their order, the manifests, the way of the configuration, RBAC, and that nobody notices; what kproxy finds when the real
kube-proxy was there before is the matter of tests/kernel/test_takeover.py.
"""
