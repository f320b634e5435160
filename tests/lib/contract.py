"""What schemathesis, which loads this, has to know beyond openapi.json."""

import os
import unicodedata
from typing import Any

import schemathesis
from hypothesis import strategies
from schemathesis import Case, HookContext

from wav import wav

schemathesis.openapi.media_type("audio/wav", strategies.just(wav()))


@schemathesis.hook
def filter_body(context: HookContext, body: Any) -> bool:
    """Leave out usernames of which the service takes another form than the one sent."""
    username = body.get("username") if isinstance(body, dict) else None
    if not isinstance(username, str):
        return True
    return username == unicodedata.normalize("NFC", username).strip()


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    """Have each credential of an upload in one of its two places, which no schema can demand."""
    if case.operation.path != "/api/upload_audiorecord/" or not isinstance(case.body, dict):
        return
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if "user_token" in case.body:
        case.headers.pop("Authorization", None)
    else:
        case.headers["Authorization"] = "Bearer " + os.environ["USER_TOKEN"]
    if "id_user" in case.body:
        case.query.pop("id_user", None)
    else:
        case.query["id_user"] = int(os.environ["ID_USER"])
