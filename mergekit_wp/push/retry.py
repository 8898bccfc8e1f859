"""Calls to the Hub that survive a dropped connection, and what went wrong as one sentence without a secret in it.

huggingface_hub itself retries every request of an upload (pre-upload, batch, parts, completion, verification: five
times within about half a minute) and hf_xet its own; it does not retry who-am-I, model information, the making of a
repository, the check of a card's metadata, or the commit. `retry` is for those.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mergekit_wp.checkpoint.hub import clean
from mergekit_wp.errors import BadInput

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
_AGAIN = (408, 429, 500, 502, 503, 504)
_HTTP_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3")

T = TypeVar("T")


def retry(call: Callable[[], T]) -> T:
    """`call()`, again after a while where the connection dropped or the Hub was not at its best."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            if wait is None or not passing(error):
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def passing(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    return status_of(error) in _AGAIN if status_of(error) is not None else _is_network(error)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of the Hub's client carries, if any."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if response is not None and isinstance(getattr(response, "status_code", None), int):
            return int(response.status_code)
    return None


def explain(error: BaseException, repo_id: str, endpoint: str) -> BadInput:
    """What the person at the keyboard should know and do about a failed call."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    links = list(_chain(error))
    again = "run the same command again: what has arrived is not sent twice"
    if any(isinstance(link, LocalTokenNotFoundError) for link in links):
        return BadInput(
            "not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token with write permission "
            "(https://huggingface.co/settings/tokens)."
        )
    if any(isinstance(link, OfflineModeIsEnabled) for link in links):
        return BadInput("HF_HUB_OFFLINE is set, so the Hub is not asked; unset it to push, or add --dry-run.")
    status = status_of(error)
    reason = clean(_reason(error))
    if status == 401:
        return BadInput(
            f"the Hub does not know this token; log in again with `hf auth login`, or mend HF_TOKEN: {reason}"
        )
    if status in (402, 403):
        return BadInput(
            f"{repo_id}: this account may not write there; give the token write permission for it "
            f"(https://huggingface.co/settings/tokens), or push to a name of your own: {reason}"
        )
    if status == 409:
        return BadInput(f"{repo_id}: the Hub refuses this name, which something else has: {reason}")
    if status is not None:
        advice = again if status in _AGAIN else "nothing was published"
        return BadInput(f"{repo_id}: the Hub answered {status}; {advice}: {reason}")
    if _is_network(error):
        return BadInput(f"no connection to {endpoint}, or it dropped and did not come back; {again} ({reason}).")
    disk = next((link for link in links if isinstance(link, OSError)), None)
    if disk is not None:
        where = f"{disk.filename}: " if disk.filename else ""
        return BadInput(f"{where}cannot be read from the disk ({disk.strerror or disk}); mend it and {again}: {reason}")
    return BadInput(f"{repo_id}: the upload stopped ({type(error).__name__}: {reason}).")


class _Clean(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = clean(record.getMessage()), ()
        return True


def clean_logs() -> None:
    """What huggingface_hub logs (it prints a line a retry) goes through `clean` as well."""
    logger = logging.getLogger("huggingface_hub")
    for handler in logger.handlers:
        if not any(isinstance(known, _Clean) for known in handler.filters):
            handler.addFilter(_Clean())


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__  # not its context: that may be an error which was dealt with


def _reason(error: BaseException) -> str:
    """The outermost words, and the innermost where they say more."""
    links = [str(link).strip() for link in _chain(error) if str(link).strip()]
    if not links:
        return type(error).__name__
    return links[0] if links[-1] in links[0] else f"{links[0]} {links[-1]}"


def _is_network(error: BaseException) -> bool:
    """Whether it comes from the HTTP library, whichever huggingface_hub uses; its own errors carry a status."""
    return any(
        isinstance(link, ConnectionError | TimeoutError)
        or any(base.__module__.startswith(_HTTP_LIBRARIES) for base in type(link).__mro__)
        for link in _chain(error)
    )


def first(values: list[Any]) -> str:
    """The first few of a list, for a sentence."""
    more = f" and {len(values) - 3} more" if len(values) > 3 else ""
    return ", ".join(map(str, values[:3])) + more
