"""URLs and the secrets that must not be in them: how one is noticed, and how such a URL is shown."""

import re

_CREDENTIALS = re.compile(
    r"(?i)://[^/@\s]*:[^/@\s]*@|\b(?:s3a?|gcs?)://[^/\s]*[:@]|[?&][\w-]*(?:sig|signature|token|secret|password|key)="
)
_QUERY = re.compile(r"(?i)([?&][\w-]*(?:sig|signature|token|secret|password|key)=)[^&\s]*")
TABLES = ("delta", "iceberg")
REMEDY = (
    "a URL is no place for credentials: leave them out and give them in the environment (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY), a profile or a role"
)


def holds_credentials(text: str) -> bool:
    """Tell whether `text` looks like a URL with a password, a token or a signature in it.

    >>> holds_credentials("s3://key:secret@bucket/runs"), holds_credentials("abfs://runs@account/x")
    (True, False)
    >>> holds_credentials("s3://key:se/cr+et@bucket/runs"), holds_credentials("s3://bucket/a:b@c")
    (True, False)
    >>> holds_credentials("delta:s3://key:se/cr+et@bucket/sales@3"), holds_credentials("delta:s3://bucket/sales@3")
    (True, False)
    """
    return _CREDENTIALS.search(text) is not None


def redacted(url: str) -> str:
    """Return a URL as it may be shown: three stars where credentials stand.

    >>> redacted("s3://key:se/cret@bucket/runs?access_key=abc&region=eu")
    's3://***@bucket/runs?access_key=***&region=eu'
    >>> redacted("s3://bucket/runs"), redacted("s3://key:secret/runs")
    ('s3://bucket/runs', 's3://***')
    >>> redacted("delta:s3://key:se/cret@bucket/sales@3")
    'delta:s3://***@bucket/sales@3'
    """
    if not holds_credentials(url):
        return url
    scheme, mark, rest = _QUERY.sub(r"\1***", url).partition("://")
    if not mark:
        return f"{scheme}{mark}{rest}"
    before, at, after = rest.rpartition("@")
    if at and table_kind(url) and "@" in before:  # the last one is of the table's version
        before, _, path = before.rpartition("@")
        after = f"{path}@{after}"
    if at:
        return f"{scheme}://***@{after}"
    return f"{scheme}://***" if ":" in rest.split("/", 1)[0] and scheme == "s3" else f"{scheme}://{before}{after}"


def table_kind(url: str) -> str:
    """Return what kind of table a URL names, empty where it names none: `delta:PATH@VERSION`, `iceberg:PATH@SNAPSHOT`.

    >>> table_kind("delta:s3://bucket/sales@3"), table_kind("data/delta"), table_kind("s3://bucket/sales")
    ('delta', '', '')
    """
    kind = url.partition(":")[0]
    return kind if kind in TABLES else ""
