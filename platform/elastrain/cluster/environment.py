"""What the containers of a cluster are told by variables, whoever lends the machines."""

import os

# Ray's exporters of numbers listen on all addresses and ask for no token. An impossible port is the only way to have
# the dashboard's and the autoscaler's not start; a spec that has them scraped sets these in its `env`.
NO_EXPORTERS = {"RAY_enable_metrics_collection": "false", "DASHBOARD_METRIC_PORT": "-1", "AUTOSCALER_METRIC_PORT": "-1"}

LABEL = "elastrain/cluster"  # of all pods of a cluster on Kubernetes, with its name

# The id of the head that `elastrain cluster local` starts, as Ray's own provider of fake nodes wants it.
LOCAL_HEAD = "f" * 51 + "00000"

# Where a node has the authority, and where it makes its own certificate from it (`cluster.certificates`).
AUTHORITY_DIR, TLS_DIR = "/home/ray/.elastrain-authority", "/home/ray/.elastrain-tls"
MAKE_CERTIFICATE = f"python -m elastrain cluster certificates {AUTHORITY_DIR} --out {TLS_DIR}"


def tls_variables(folder: str) -> dict[str, str]:
    """Return what Ray has to be told to encrypt its gRPC with the certificates in `folder`."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": f"{folder}/node.crt",
        "RAY_TLS_SERVER_KEY": f"{folder}/node.key",
        "RAY_TLS_CA_CERT": f"{folder}/ca.crt",
    }


def uses_tls() -> bool:
    """Say whether this process is told to encrypt, in the words that Ray takes for yes."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
