"""Why a folder or hub id cannot be read, in one sentence: the libraries tell most such reasons alike."""

from __future__ import annotations

import os
from collections.abc import Iterator

from huggingface_hub import auth_check, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from leapalign.inputs.validation import UserError, brief

BAD_TOKEN = "Invalid credentials in Authorization header"
"""What the hub says of a token that it does not know."""


def unreadable(error: Exception, path: str, setting: str, otherwise: str) -> UserError:
    """The sentence for ``error``, which a library raised while it read from the folder or hub id ``path``.

    setting: the option that ``path`` comes from. otherwise: how the sentence begins where the files are to blame, not
    the way to them. A sentence stays as it is.
    """
    if isinstance(error, UserError):
        return error
    found = None if os.path.exists(path) else _missing(error, path, setting)
    return UserError(found or f"{otherwise} ({brief(error)}); check {setting}")


def _missing(error: Exception, path: str, setting: str) -> str | None:
    """Why what ``path`` means is not here; None where it is a repository of the hub, and can be read."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return f"there is no folder '{path}', and it can be no hub id; check {setting}"
    return _refusal(error, path, setting) or _refusal(_asked(path), path, setting)


def _asked(path: str) -> Exception | None:
    """What the hub says when it is asked for the repository: libraries may have kept its answer to themselves."""
    try:
        auth_check(path)
    except (HfHubHTTPError, OfflineModeIsEnabled) as error:
        return error
    except Exception as error:  # of the network, by a library that is not ours to know
        return ConnectionError(str(error))
    return None


def _refusal(error: BaseException | None, path: str, setting: str) -> str | None:
    causes = list(_causes(error))
    for cause in causes:
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if isinstance(cause, GatedRepoError):
            return (
                f"the hub gives '{path}' only to those who accepted its licence; accept it on "
                f"https://huggingface.co/{path}, then log in with `hf auth login` or set HF_TOKEN to a token of yours"
            )
        if status == 401 and BAD_TOKEN in str(cause):
            return f"the hub refuses your token for '{path}'; log in again with `hf auth login`, or correct HF_TOKEN"
        # Of what is not there the hub tells strangers that they may not see it.
        if isinstance(cause, RepositoryNotFoundError) or status == 401:
            return (
                f"'{path}' is neither a folder here nor a repository of the hub that you may see; check {setting}, or "
                "log in with `hf auth login` if it is private"
            )
        if isinstance(cause, ConnectionError | LocalEntryNotFoundError) or status == 429 or (status or 0) >= 500:
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else brief(causes[-1])
            return (
                f"'{path}' is no folder here, and the hub could not be reached ({why}); where there is a network, run "
                f"`hf download {path} --local-dir DIR`, then set {setting}=DIR"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
