"""TLS for test API servers."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


def server_tls(folder: Path, *addresses: str) -> ssl.SSLContext:
    """Return a server context with a new self-signed certificate for some IP addresses.

    The certificate is written to `server.crt` in `folder`, so that clients can trust it.
    """
    names = ",".join(f"IP:{address}" for address in addresses)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", "/CN=kube-apiserver", "-addext", f"subjectAltName={names}"]
    command += ["-keyout", str(folder / "server.key"), "-out", str(folder / "server.crt")]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    return context
