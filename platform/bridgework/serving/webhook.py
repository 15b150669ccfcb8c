"""MLflow's webhooks about moved aliases: authenticated by a signature, because MLflow sends no key.

An MLflow server posts an event to PATH when an alias is set or deleted. The gateway then asks the
registry at once, instead of after `poll_s` seconds. The event's content is not used, so a repeated
or late event changes nothing.
"""

import base64
import hashlib
import hmac
import os
import time
from collections.abc import Callable, Mapping

from fastapi import APIRouter

from bridgework.serving.errors import APIError

PATH = "/v1/webhooks/mlflow"
VARIABLE = "BRIDGEWORK_WEBHOOK_SECRET"
MAX_BYTES = 65_536  # of an event
MAX_AGE_S = 300.0  # of a signature


def secret_from_environment() -> bytes | None:
    """Return the secret that MLflow's webhook has too; None if there is none."""
    return os.environ.get(VARIABLE, "").strip().encode() or None


def check_signature(secret: bytes, headers: Mapping[str, str], body: bytes) -> None:
    """Raise APIError (401) unless MLflow signed this body with the secret, a short time ago.

    The signature is "v1," and the base64 of the HMAC-SHA256 of ID.TIME.BODY, as in Standard Webhooks.
    """
    sent = headers.get("x-mlflow-timestamp", "")
    signed = b".".join((headers.get("x-mlflow-delivery-id", "").encode(), sent.encode(), body))
    code = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest())
    given = headers.get("x-mlflow-signature", "").encode()
    equal = hmac.compare_digest(b"v1," + code, given)
    is_number = sent.isascii() and sent.isdigit()
    if not equal or not is_number or abs(time.time() - int(sent[:12])) > MAX_AGE_S:
        message = (
            f"the webhook's signature is not valid, or older than {MAX_AGE_S:g} s. "
            f"Fix: give MLflow's webhook the secret in {VARIABLE}"
        )
        raise APIError(401, message, code="invalid_signature")


def webhook_routes(moved: Callable[[], bool]) -> APIRouter:
    """Return the route POST PATH. `moved` starts a look at the aliases, False if none is followed."""
    api = APIRouter()

    @api.post(PATH, status_code=202)
    async def event() -> dict[str, str]:
        if not moved():
            message = "this app follows no alias. Fix: start it with follow=alias"
            raise APIError(409, message, code="not_following")
        return {"status": "accepted"}

    return api
