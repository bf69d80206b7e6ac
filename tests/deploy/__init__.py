"""What is shipped, held against what it is for: image, manifests, alerts, dashboard.

- `test_manifests.py`: what `kubectl kustomize` renders: validated against the Kubernetes schemas, and held against the
  daemon's own flags, files and ports. Skipped where there is neither kubectl nor kustomize.
- `test_rbac.py`: the daemon against the test API server; the ClusterRole allows what it asks for, and nothing else.
- `test_monitoring.py`: alerts and dashboard name metrics that the daemon's page has; each alert has its section in
  docs/operations.md.
- `test_iptables_variant.py`: which iptables an image takes.
- `test_image.py`: the image itself, run by runc with the privileges that the DaemonSet gives it. Skipped unless
  KPROXY_IMAGE_ROOT names a folder with its files: `make image-test` builds the image and sets it, which takes minutes.
"""
