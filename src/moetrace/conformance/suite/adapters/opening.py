"""From an address to a subject: which dialect is spoken there."""

from __future__ import annotations

import httpx

from moetrace.client.http import checked_url
from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.adapters.http import KEY_REFUSED, SECONDS_TO_TELL, HttpSubject, require_ok
from moetrace.conformance.suite.adapters.lightllm import LightLLMSubject, MoetraceSubject
from moetrace.conformance.suite.adapters.sglang import SGLangSubject
from moetrace.conformance.suite.adapters.vllm import VLLMSubject
from moetrace.errors import CheckError

DIALECTS: dict[str, type[HttpSubject]] = {
    subject.dialect: subject for subject in (MoetraceSubject, LightLLMSubject, SGLangSubject, VLLMSubject)
}
_TELLTALE = {"/model": ("moetrace", "fingerprint"), "/get_model_info": ("sglang", "model_path")}
"""What only one engine has: a path, and a key of its answer."""
_MODELS = "/v1/models"


async def open_subject(
    url: str, form: DyeForm, dialect: str = "auto", api_key: str | None = None, client: httpx.AsyncClient | None = None
) -> HttpSubject:
    """An engine at an address.

    Args:
        url: its base.
        form: the checkpoint that it serves.
        dialect: a key of `DIALECTS`, or "auto".
        api_key: sent as `Authorization: Bearer`.
        client: to ask with, instead of one for `url`.

    Raises:
        RequestError: the address is no URL.
        CheckError: nobody answers there, or in no dialect that is known; the key cannot be sent, or is refused; or
            the server says that it serves another model.
    """
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise CheckError("the API key cannot be sent", expected="printable ASCII")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # most servers close an idle connection after 5 s, and lose a request that is sent at that moment
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2)
    client = client or httpx.AsyncClient(base_url=checked_url(url), headers=headers, timeout=None, limits=limits)
    try:
        if dialect == "auto":
            dialect = await _dialect_of(client, url)
        subject = DIALECTS[dialect](client, form)
        await subject.open()
    except BaseException:
        await client.aclose()
        raise
    return subject


async def _dialect_of(client: httpx.AsyncClient, url: str) -> str:
    try:
        response = await client.get(_MODELS, timeout=SECONDS_TO_TELL)
    except httpx.HTTPError as error:
        raise CheckError(f"nobody answers at {url}", got=repr(error), fix="Start the engine first.") from error
    if response.status_code in KEY_REFUSED:
        require_ok(_MODELS, response)
    probe = HttpSubject(client, None)  # type: ignore[arg-type]
    for path, (dialect, key) in _TELLTALE.items():
        if key in (await probe.get(path) or {}):
            return dialect
    models = await probe.get(_MODELS) or {}
    owners = {model.get("owned_by") for model in models.get("data", [])}
    for dialect in ("vllm", "sglang"):
        if dialect in owners:
            return dialect
    if await probe.get("/get_model_name") is not None:
        return "lightllm"
    raise CheckError(f"what runs at {url} does not say what it is", fix=f"Pass --dialect: {', '.join(DIALECTS)}.")
