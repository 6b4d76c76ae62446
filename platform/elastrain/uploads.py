"""Uploads in parts that somebody began and never finished: a killed writer's, which cost storage and show in no list.

Neither Arrow nor obstore knows of them, so these two requests of S3 are made and signed (Signature Version 4) here. It
is best effort: what may not be listed, and what has its keys from a machine's role, is left to a rule of the bucket.
"""

import contextlib
import hashlib
import hmac
import http.client
import os
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

from elastrain.credentials import Keys, find_keys
from elastrain.errors import StorageError
from elastrain.s3 import endpoint, is_s3, place, tried

ANSWER_S = 15.0
NOTHING = hashlib.sha256(b"").hexdigest()
PAGES = 100  # of 1,000 uploads each: more are left for the next time


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """An upload that was begun: the file that it would have become, and what the store calls it."""

    url: str
    number: str


def unfinished(url: str) -> list[Upload]:
    """Return the uploads below a folder that are not finished, those under way included.

    Raises StorageError if the store does not tell; on other storage than S3, and without keys, there are none.
    """
    keys = find_keys() if is_s3(url) else None
    if keys is None:
        return []
    bucket, _, folder = place(url).partition("/")
    found: list[Upload] = []
    more: dict[str, str] = {}
    for _ in range(PAGES):
        query = {"uploads": "", "prefix": f"{folder}/" if folder else "", **more}
        page = _page(f"/{bucket}", query, keys, url)
        for each in page.iterfind("{*}Upload"):
            key = _text(each, "Key")
            if key.startswith(f"{folder}/" if folder else ""):  # not every store honours the prefix
                found.append(Upload(url=f"s3://{bucket}/{key}", number=_text(each, "UploadId")))
        if _text(page, "IsTruncated") != "true":
            break
        more = {"key-marker": _text(page, "NextKeyMarker"), "upload-id-marker": _text(page, "NextUploadIdMarker")}
    return found


def abort(folders: Iterable[str]) -> int:
    """End what is not finished below folders that only the caller writes; return how many uploads that were.

    Raises nothing: what cannot be ended for as long as storage is waited for is found the next time.
    """
    ended = 0
    with contextlib.suppress(StorageError, ET.ParseError):
        for folder in folders:
            for upload in unfinished(folder):
                _end(upload)
                ended += 1
    return ended


def _page(path: str, query: Mapping[str, str], keys: Keys, url: str) -> ET.Element:
    answer = tried("look for unfinished uploads in", url, lambda: _asked("GET", path, query, keys, url))
    return ET.fromstring(answer)  # noqa: S314 -- from the store we trust


def _end(upload: Upload) -> None:
    path, query = f"/{place(upload.url)}", {"uploadId": upload.number}
    tried("end the unfinished upload of", upload.url, lambda: _asked("DELETE", path, query, find_keys(), upload.url))


def _text(node: Any, name: str) -> str:
    return str(node.findtext(f"{{*}}{name}") or "")


def _asked(method: str, path: str, query: Mapping[str, str], keys: Keys | None, url: str) -> bytes:
    """Make one request; return the answer's body, raises what `s3.tried` knows how to judge for any but a good one."""
    if keys is None:
        raise StorageError(f"{url}: the keys for S3 are not there any more")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    where = urlsplit(endpoint() or f"https://s3.{region}.amazonaws.com")
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    connection = kind(where.netloc, timeout=ANSWER_S)
    path = quote(path, safe="/-_.~")
    asked = "&".join(f"{quote(name, safe='-_.~')}={quote(query[name], safe='-_.~')}" for name in sorted(query))
    try:
        connection.request(method, f"{path}?{asked}", headers=_signed(method, where.netloc, path, asked, keys, region))
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"AWS Error NETWORK_CONNECTION: {error}") from None
    finally:
        connection.close()
    if answer.status == http.HTTPStatus.NOT_IMPLEMENTED:
        raise StorageError(
            f"{url}: the store does not tell of unfinished uploads; let a rule of the bucket remove them"
        )
    if answer.status not in (200, 204, 404):  # 404: ended meanwhile
        raise OSError(f"AWS Error HTTP status {answer.status}")
    return body


def _signed(method: str, host: str, path: str, query: str, keys: Keys, region: str) -> dict[str, str]:
    """Return the headers of a request without a body, as Signature Version 4 of AWS has them."""
    now = datetime.fromtimestamp(time.time(), UTC).strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": host, "x-amz-content-sha256": NOTHING, "x-amz-date": now}
    if keys.token:
        headers["x-amz-security-token"] = keys.token
    names = ";".join(sorted(headers))
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    request = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{NOTHING}"
    scope = f"{now[:8]}/{region}/s3/aws4_request"
    digest = hashlib.sha256(request.encode()).hexdigest()
    key = f"AWS4{keys.secret}".encode()
    for part in (now[:8], region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}".encode(), "sha256").hex()
    said = f"AWS4-HMAC-SHA256 Credential={keys.key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {**headers, "authorization": said}
