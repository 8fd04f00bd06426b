"""What a Hub answers, in words that help: which of repo, revision and folder is wrong, what to do, how long to wait."""

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


def reason(
    error: Exception,
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike | None = None,
) -> str:
    """One or two sentences on why the Hub did not do what was asked of `repo_id`.

    Args:
        error: What the Hub's client, or transformers on top of it, raised; its causes are looked through.
        repo_id: The repo that was asked for.
        revision: The revision that was asked for. Default: the repo's main branch.
        token: The token that was passed, to tell where a bad one came from.
        cache_dir: The cache that was asked for, to tell how to fill it.
    """
    chain = list(_causes(error))

    def found(*types: type[Exception]) -> Exception | None:
        return next((one for one in chain if isinstance(one, types)), None)

    if found(HFValidationError):
        return f"{repo_id!r} is no Hub id; expected the form 'org/name'."
    if found(OfflineModeIsEnabled) or (found(LocalEntryNotFoundError, RevisionResolutionError) and constants.HF_HUB_OFFLINE):
        command = _download(repo_id, revision, cache_dir)
        return f"Offline mode is on (HF_HUB_OFFLINE), and {repo_id!r} is not whole in the cache. {command}"
    if found(GatedRepoError):
        return (
            f"{repo_id!r} is gated: ask for access at {constants.ENDPOINT}/{repo_id}, then log in with `hf auth login` "
            f"({_token_source(token)})."
        )
    if found(RevisionNotFoundError):
        return f"{repo_id!r} exists, but has no revision {str(revision)!r}; {_revisions(repo_id, token)}."
    answer = found(HfHubHTTPError)
    status = answer.response.status_code if answer is not None else None
    if status == 401 and _has_token(token) and not (found(RepositoryNotFoundError) and _accepted(token)):
        return f"The Hub refused the token as invalid: {_token_source(token)}. Make another with `hf auth login`."
    if found(RepositoryNotFoundError):
        return (
            f"There is no repo {repo_id!r}, or it is private and you may not see it ({_token_source(token)}). Expected a Hub "
            "id that exists; for a private repo, log in with `hf auth login` or pass token=."
        )
    if status == 401:
        return f"The Hub wants a token for {repo_id!r}, and none was sent: log in with `hf auth login` or pass token=."
    if status == 403:
        return f"You may not do that with {repo_id!r}: the token lacks the permission ({_token_source(token)}). {answer}"
    if status == 412:
        return f"{repo_id!r} was changed by someone else meanwhile; nothing was written. Do it again."
    if status == 429:
        return f"The Hub limits how often it is asked; expected to be asked again {_wait(answer)}."
    if status is not None and status >= 500:
        return f"The Hub is unavailable (status {status}): nothing is wrong with {repo_id!r}. Retry in a minute."
    if _cut_off(chain):
        return (
            f"The transfer of {repo_id!r} was cut off and is incomplete; nothing of the unfinished file is kept. Retry "
            f"({_last(chain)})."
        )
    if any(_is_a(one, "TransportError") for one in chain):
        return f"The Hub at {constants.ENDPOINT} did not answer ({_last(chain)}). Check the connection and retry."
    if any(_is_a(one, "JSONDecodeError") for one in chain) or found(FileMetadataError):
        return (
            f"What answers at {constants.ENDPOINT} is not the Hub: it sent no JSON, or not the Hub's headers. Is a proxy or a "
            "login page between? If not, retry in a minute."
        )
    if found(LocalEntryNotFoundError, RevisionResolutionError):
        return f"local_files_only=True, and {repo_id!r} is not whole in the cache. {_download(repo_id, revision, cache_dir)}"
    return f"{type(error).__name__}: {error}"


def answered(error: Exception) -> bool:
    """Whether the Hub itself said no: if not, a request may have been carried out and its answer lost."""
    return any(isinstance(one, HfHubHTTPError) for one in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_a(error: BaseException, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(error).__mro__)  # the HTTP library is the client's own affair


def _cut_off(chain: list[BaseException]) -> bool:
    return any(_is_a(one, "RemoteProtocolError") or "Consistency check failed" in str(one) for one in chain)


def _last(chain: list[BaseException]) -> str:
    return f"{type(chain[-1]).__name__}: {chain[-1]}"


def _download(repo_id: str, revision: str | None, cache_dir: str | PathLike | None) -> str:
    options = {"--revision": revision, "--cache-dir": cache_dir}
    told = "".join(f" {name} {shlex.quote(str(value))}" for name, value in options.items() if value)
    return f"While online, run: `hf download {repo_id}{told}`."


def _revisions(repo_id: str, token: str | bool | None) -> str:
    try:
        refs = HfApi(token=token).list_repo_refs(repo_id)
    except Exception:  # a help to the first error must not hide it
        return "its branches and tags could not be listed"
    branches = ", ".join(ref.name for ref in refs.branches) or "none"
    return f"branches: {branches}; tags: {', '.join(ref.name for ref in refs.tags) or 'none'}"


def _has_token(token: str | bool | None) -> bool:
    return isinstance(token, str) or (token is not False and get_token() is not None)


def _accepted(token: str | bool | None) -> bool:
    try:
        HfApi(token=token).whoami()
    except HfHubHTTPError as error:
        return error.response.status_code != 401
    except Exception:  # unreachable: unknown, so not to be blamed
        return True
    return True


def _token_source(token: str | bool | None) -> str:
    if isinstance(token, str):
        return "the token passed as token="
    if token is False or get_token() is None:
        return "no token was sent"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"the token in the environment variable {name}"
    return f"the token in {constants.HF_TOKEN_PATH}"


def _wait(answer: HfHubHTTPError) -> str:
    headers = answer.response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return f"in {limit.reset_in_seconds} s"
    wait = headers.get("Retry-After", "")
    return f"in {wait} s" if wait.isdigit() else f"after {wait}" if wait else "in a minute"
