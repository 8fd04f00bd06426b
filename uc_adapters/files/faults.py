"""Explains why the Hub did not do what it was asked to do."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from os import PathLike

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import get_token, parse_ratelimit_headers

_LOG_IN = "log in with `hf auth login` or pass token="
_NO_TOKEN = "no token was sent"


def reason(
    error: Exception,
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
) -> str:
    """Says in one or two sentences why the Hub did not do what was asked of `repo_id`, and what the user can do.

    Args:
        error: The exception of the Hub's client, or of transformers on top of it. Its causes are searched, too.
        repo_id: The repo of the request.
        revision: The revision of the request. Default: the repo's main branch.
        token: The token that was passed.
        cache_dir: The cache that was passed.
    """
    chain = list(_causes(error))

    def found(*types: type[Exception] | str) -> Exception | None:
        """The first cause of one of these classes. The HTTP library is the client's own choice: its classes go by name."""
        names = {kind if isinstance(kind, str) else kind.__name__ for kind in types}
        return next((one for one in chain if names & {kind.__name__ for kind in type(one).__mro__}), None)

    answer = found(HfHubHTTPError)
    status = answer.response.status_code if answer else 0
    sent = _token_source(token)
    last = f"{type(chain[-1]).__name__}: {chain[-1]}"
    uncached = found(LocalEntryNotFoundError, RevisionResolutionError)
    if found(HFValidationError):
        return f"{repo_id!r} is no Hub id; expected the form 'org/name'."
    if found(OfflineModeIsEnabled) or (uncached and constants.HF_HUB_OFFLINE):
        return f"Offline mode is on (HF_HUB_OFFLINE), and {_fill_cache(repo_id, revision, cache_dir)}"
    if found(GatedRepoError):
        return f"{repo_id!r} is gated: ask for access at {constants.ENDPOINT}/{repo_id}, then {_LOG_IN} ({sent})."
    if found(RevisionNotFoundError):
        return f"{repo_id!r} exists, but has no revision {str(revision)!r}; {_revisions(repo_id, token)}."
    if status == 401 and sent != _NO_TOKEN:  # for a repo that a valid token may not see, the Hub answers 404
        return f"The Hub refused the token as invalid: {sent}. Make another with `hf auth login`."
    if status == 401 or found(RepositoryNotFoundError):
        return (
            f"There is no repo {repo_id!r}, or it is private and you may not see it ({sent}). Expected a Hub id that exists; "
            f"for a private repo, {_LOG_IN}."
        )
    if status == 403:
        return f"You may not do that with {repo_id!r}: the token lacks the permission ({sent}). {answer}"
    if status == 412:
        return f"{repo_id!r} was changed by someone else meanwhile; nothing was written. Do it again."
    if status == 429:
        return f"The Hub limits how often it is asked; expected to be asked again {_wait(answer)}."
    if status >= 500:
        return f"The Hub is unavailable (status {status}): nothing is wrong with {repo_id!r}. Retry in a minute."
    if found("RemoteProtocolError") or any("Consistency check failed" in str(one) for one in chain):
        return f"The transfer of {repo_id!r} was cut off and is incomplete; nothing of it is kept. Retry ({last})."
    if found("TransportError"):
        return f"The Hub at {constants.ENDPOINT} did not answer ({last}). Check the connection and retry."
    if found("JSONDecodeError", FileMetadataError):
        return (
            f"What answers at {constants.ENDPOINT} is not the Hub: it sent no JSON, or not the Hub's headers. Is a proxy or a "
            "login page between? If not, retry in a minute."
        )
    if uncached:
        return f"local_files_only=True, and {_fill_cache(repo_id, revision, cache_dir)}"
    return f"{type(error).__name__}: {error}"


def answered(error: Exception) -> bool:
    """Returns whether the Hub itself refused. If not, it may have carried out a request and its answer was lost."""
    return any(isinstance(one, HfHubHTTPError) for one in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _fill_cache(repo_id: str, revision: str | None, cache_dir: str | PathLike | None) -> str:
    options = {"--revision": revision, "--cache-dir": cache_dir}
    command = f"hf download {repo_id}" + "".join(
        f" {name} {shlex.quote(str(value))}" for name, value in options.items() if value
    )
    return f"{repo_id!r} is not whole in the cache. While online, run: `{command}`."


def _revisions(repo_id: str, token: str | bool | None) -> str:
    try:
        refs = HfApi(token=token).list_repo_refs(repo_id)
    except Exception:  # this is an addition to the first error, and must not hide it
        return "its branches and tags could not be listed"
    branches, tags = (", ".join(ref.name for ref in kind) or "none" for kind in (refs.branches, refs.tags))
    return f"branches: {branches}; tags: {tags}"


def _token_source(token: str | bool | None) -> str:
    if isinstance(token, str):
        return "the token passed as token="
    if token is False or get_token() is None:
        return _NO_TOKEN
    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    return f"the token in the environment variable {variable}" if variable else f"the token in {constants.HF_TOKEN_PATH}"


def _wait(answer: HfHubHTTPError) -> str:
    limit = parse_ratelimit_headers(answer.response.headers)
    if limit is not None and limit.remaining == 0:
        return f"in {limit.reset_in_seconds} s"
    wait = answer.response.headers.get("Retry-After", "")
    return f"in {wait} s" if wait.isdigit() else f"after {wait}" if wait else "in a minute"
