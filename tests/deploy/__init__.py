"""The deployment: image, manifests, alerts and dashboard.

- `test_manifests.py`, `test_site.py`: the output of `kubectl kustomize`, validated against the Kubernetes schemas and
  compared with the daemon's flags, files and ports. Skipped without kubectl and kustomize.
- `test_rbac.py`: the ClusterRole allows exactly the requests that the daemon sends to the test API server.
- `test_node_selector.py`: the patches in docs/operations.md that replace and restore kube-proxy.
- `test_kind.py`: `make kind-up`.
- `test_monitoring.py`, `test_alerts.py`: alerts and dashboard use existing metrics, alerts fire when they should, and
  each alert has a section in docs/operations.md.
- `test_iptables_variant.py`: which iptables variant is selected in the image.
- `test_image.py`: the image, run by runc with the privileges of the DaemonSet. Skipped unless KPROXY_IMAGE_ROOT is the
  root file system of the image: `make image-test` builds the image and sets it, which takes minutes.
"""
