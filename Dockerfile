# kproxy with Python, iptables and nftables from one Debian release. The image has no shell and no package manager.
# `make image` builds it with docker, podman or buildah. Without access to a registry, `make image-base` builds a BASE.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get -qq update && apt-get -qq install -y --no-install-recommends \
    gcc iptables kmod libc6-dev libip4tc-dev libip6tc-dev libxtables-dev netbase nftables python3-dev python3-venv
RUN python3 -m venv /opt/kproxy
# Dependencies change less often than kproxy, so they get a layer of their own. pip accepts only files whose hashes are
# listed, and builds packages with the listed version of setuptools.
COPY deploy/image/build-requirements.txt deploy/image/requirements.txt /src/
RUN /opt/kproxy/bin/pip install --no-cache-dir --no-compile --require-hashes -r /src/build-requirements.txt \
    && /opt/kproxy/bin/pip install --no-cache-dir --no-compile --no-build-isolation --require-hashes -r /src/requirements.txt
COPY LICENSE README.md pyproject.toml /src/
COPY kproxy /src/kproxy
RUN /opt/kproxy/bin/pip install --no-cache-dir --no-compile --no-build-isolation --no-deps /src \
    # Only kubernetes.aio needs these; pip and setuptools are build tools.
    && /opt/kproxy/bin/pip uninstall --yes aiohappyeyeballs aiohttp aiohttp-retry aiosignal frozenlist multidict propcache \
        yarl pip setuptools
COPY deploy/image/rootfs.py /src/deploy/image/
RUN python3 /src/deploy/image/rootfs.py /rootfs

FROM scratch
COPY --from=build /rootfs /
# kproxy detects the host's iptables variant at startup. PATH contains the nf_tables variant, the usual one.
# One memory pool for all threads, which hold Python's global lock whenever they allocate: saves 1 to 2 MB.
ENV PATH=/opt/kproxy/bin:/usr/sbin:/usr/bin \
    KPROXY_IPTABLES=/usr/lib/kproxy/iptables \
    MALLOC_ARENA_MAX=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="kproxy" \
    org.opencontainers.image.description="The Linux kube-proxy, reimplemented in Python" \
    org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["kproxy"]
CMD ["run"]
