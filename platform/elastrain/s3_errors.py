"""What the errors of S3 mean, by Arrow's words for them: what cannot pass, and what to do about it."""

import os
import re

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# What is final, in the words of Arrow's errors, and what to do about it.
FINAL = (
    (
        r"configured region is|PERMANENT_REDIRECT|HTTP status 30\d|AuthorizationHeaderMalformed|ILLEGAL_LOCATION",
        "the bucket is in another region: set AWS_REGION to the bucket's",
    ),
    (
        r"SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|INVALID_SIGNATURE"
        r"|MISSING_AUTHENTICATION|(?i:expired_?token)|InvalidToken|HTTP status 401"
        r"|HTTP status 400\) during Head",  # which has no body to say more
        "the credentials are wrong or have expired: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile or "
        "the role",
    ),
    (
        r"REQUEST_TIME_TOO_SKEWED|RequestTimeTooSkewed|REQUEST_EXPIRED",
        "this machine's clock and the server's are too far apart: set the clock",
    ),
    (
        r"ACCESS_DENIED|FORBIDDEN|HTTP status 403",
        "access denied: check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, profile or role), what "
        "they are permitted, and this machine's clock",
    ),
    (r"NO_SUCH_BUCKET", "there is no such bucket: create it, or check its name and AWS_ENDPOINT_URL"),
    (
        r"HTTP status 411",
        "the server wants to know lengths beforehand: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    ),
    (
        r"curlCode: (?:51|58|60|77)\b",
        "the server's certificate is not trusted: check AWS_ENDPOINT_URL, or name the file of its authority in "
        "SSL_CERT_FILE",
    ),
)
GONE = re.compile(r"NO_SUCH_KEY|RESOURCE_NOT_FOUND|HTTP status 404")
REFUSED = re.compile(r"HTTP status 4(?!08|16|29)\d\d")  # not a timeout, an object replaced meanwhile, too many requests
NO_ANSWER = re.compile(r"NETWORK_CONNECTION|curlCode")


def said(error: BaseException) -> str:
    """Return the part of an error of Arrow that is S3's: before it stand names, which may say anything."""
    return str(error).rpartition("AWS Error ")[2]


def final(text: str, url: str) -> str | None:
    """Return what is wrong and what to do if trying again cannot help, else None."""
    for pattern, remedy in FINAL:
        if re.search(pattern, text):
            return remedy
    return plain(text, url) if REFUSED.search(text) else None


def outage(text: str, where: str, seconds: float) -> str:
    """Return what to say of a server (`where`; empty: AWS itself) that has given no proper answer for so long."""
    server = where or "AWS"
    reason = re.search(r"curlCode: \d+, ([^;]*)|HTTP status \d+", text)
    said = (reason[1] or reason[0]) if reason else _first_sentence(text)
    return (
        f"no proper answer from {server} in {seconds:.0f} s ({said}); check AWS_ENDPOINT_URL and that the server runs"
    )


def plain(text: str, url: str) -> str:
    """Return what the server said, for what has no sentence of its own."""
    bucket = url.removeprefix("s3://").split("/", 1)[0]
    return f"{_first_sentence(text)}; check the path and what the server of {bucket} says"


def _first_sentence(text: str) -> str:
    """Return what a library says, short and without any secret of the environment."""
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***")
    return re.sub(r" \(Request ID: .*?\)", "", (text.splitlines() or ["no reason given"])[0])[:300]
