"""What object storage answers, in words that a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from reducio_latents.core.text import without_secrets
from reducio_latents.errors import LatentsError, StoreError


@contextmanager
def explained(verb: str, where: str) -> Iterator[None]:
    """Turn what obstore raises into a StoreError; a missing file stays a FileNotFoundError."""
    try:
        yield
    except LatentsError:
        raise
    except Exception as err:
        from obstore.exceptions import BaseError

        no_bucket = "NoSuchBucket" in str(err)
        if isinstance(err, FileNotFoundError) and not no_bucket:
            raise FileNotFoundError(f"{where} does not exist") from None
        if no_bucket or isinstance(err, BaseError | ValueError):
            raise StoreError(f"cannot {verb} {where}: {reason(str(err))}") from None
        raise


CAUSES = (
    ("NoSuchBucket", "there is no such bucket. Check its name, or make it"),
    (
        "169.254.169.254",
        "there are no credentials in the environment. Set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a public bucket), or those of your "
        "provider",
    ),
    (
        r"status code: 40[13]|Unauthenticated|PermissionDenied",
        "permission denied. Check the credentials in the environment, and what they may do",
    ),
    (
        r"status code: 5\d\d",
        "the server failed, and again when it was asked anew. Run the same command again later: "
        "what is committed stays",
    ),
    (
        r"error sending request|timed out|operation timed",
        "no answer. Check the network and the address (of S3: AWS_ENDPOINT_URL, AWS_REGION)",
    ),
)


def reason(text: str) -> str:
    """Return what is wrong and how to mend it, with the service's own words, less any secret."""
    head = text.partition("\n\nDebug source")[0]
    code = re.search(r"<Code>(\w+)</Code>", head)
    words = " ".join(head.partition("<?xml")[0].partition("<Error>")[0].split())
    words = without_secrets(words)[:400].rstrip(" :")
    if code:
        words += f": {code[1]}"
    for pattern, cause in CAUSES:
        if re.search(pattern, head):
            return f"{cause}. ({words})"
    return f"{words}."
