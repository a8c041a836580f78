"""The Hugging Face hub: downloads into its cache, uploads, and its errors in words. Nothing that is downloaded is executed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ddkit.errors import DDKitError, HubError, MissingDataError, MissingModelError, UsageError

Kind = Literal["model", "dataset"]

_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A wrong id or an answer that is not JSON is a ValueError. The hub's own error has two bases: OSError, and the root of the
# errors of the HTTP client.
HUB_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    *(kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception),
)
_TRANSPORT_ERROR = HfHubHTTPError.__mro__[1]
_UPLOAD_ERRORS: tuple[type[Exception], ...] = (*HUB_ERRORS, RuntimeError)  # RuntimeError: one of several files failed
_LOGIN = "Log in with a token that may write: hf auth login. Or set HF_TOKEN."


def is_hub_id(text: str) -> bool:
    """True for user/name, unless `user` is a folder here: then the text is the path of something that is missing."""
    return _ID.fullmatch(text) is not None and not Path(text).parent.is_dir()


def require_hub_id(text: str) -> None:
    """Raise UsageError for text that cannot be the id of a repository on the hub."""
    if _ID.fullmatch(text) is None:
        raise UsageError(f"'{text}' is not an id on the Hugging Face hub.", "Write it as user/name.")


def download(hub_id: str, kind: Kind, patterns: Sequence[str]) -> Path:
    """Download the files that match one of the patterns, unless the hub's cache holds them; return the repository's folder.

    Files that the repository does not have are missing in the folder. Without a network, what the cache holds is used.
    Raises MissingModelError or MissingDataError, by `kind`.
    """
    try:
        return Path(HfApi().snapshot_download(hub_id, repo_type=kind, allow_patterns=list(patterns)))
    except HUB_ERRORS as error:
        raise _unavailable(hub_id, kind, error) from error


def dataset_files(hub_id: str) -> list[str]:
    """The paths of all files in a dataset repository. Raises MissingDataError."""
    try:
        found = HfApi().dataset_info(hub_id).siblings or []
    except HUB_ERRORS as error:
        raise _unavailable(hub_id, "dataset", error) from error
    return [file.rfilename for file in found]


def create_repository(hub_id: str, kind: Kind, *, private: bool = False) -> str:
    """Create a repository on the hub unless it is there, and return its address.

    private: if it is created, only its owner can see it. Raises HubError if nobody is logged in, or the hub refuses or
    cannot be reached.
    """
    if get_token() is None:
        raise HubError("You are not logged in to the Hugging Face hub.", _LOGIN)
    with _writing(hub_id):
        return str(HfApi().create_repo(hub_id, repo_type=kind, private=private or None, exist_ok=True))


def upload(hub_id: str, kind: Kind, files: Mapping[str, Path | bytes], message: str) -> None:
    """Commit files to a repository: path there -> a file, or its bytes. Raises what `create_repository` raises."""
    additions = [CommitOperationAdd(path, str(file) if isinstance(file, Path) else file) for path, file in files.items()]
    with _writing(hub_id):
        HfApi().create_commit(hub_id, additions, commit_message=message, repo_type=kind)


@contextlib.contextmanager
def _writing(hub_id: str) -> Iterator[None]:
    try:
        yield
    except _UPLOAD_ERRORS as error:
        remedy = "Run the same command again; what was uploaded is not uploaded again."
        for cause in _causes(error):
            if isinstance(cause, HfHubHTTPError) and 400 <= cause.response.status_code < 500:
                remedy = _LOGIN if cause.response.status_code in (401, 403) else ""
        raise HubError(f"'{hub_id}' cannot be written on the hub: {reason_of(error)}", remedy) from error


def source_name(folder: Path) -> str:
    """`user/name@revision` for a folder in the hub's cache, else the folder's path."""
    parts = folder.parts[-3:]
    if len(parts) == 3 and parts[1] == "snapshots" and parts[0].startswith("models--"):
        return f"{parts[0].removeprefix('models--').replace('--', '/', 1)}@{parts[2][:12]}"
    return str(folder)


def reason_of(error: Exception) -> str:
    """Why the hub failed, in one sentence."""
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, which forbids downloads."
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return "one of its files is missing on the hub."
        if isinstance(cause, RepositoryNotFoundError):
            return "the hub does not have it, or does not show it to you."
        if isinstance(cause, HfHubHTTPError) and (said := cause.server_message):
            return f"the hub says: {said.strip().rstrip('.')}."
        if isinstance(cause, _TRANSPORT_ERROR) and not isinstance(cause, HfHubHTTPError):
            return f"the hub cannot be reached ({str(cause) or type(cause).__name__})."
    # The first line of its message, or its type if it has none.
    return f"{str(error).strip().partition(chr(10))[0].rstrip('.') or type(error).__name__}."


def _unavailable(hub_id: str, kind: Kind, error: Exception) -> DDKitError:
    unknown = isinstance(error, RepositoryNotFoundError)
    login = "If it is private, log in: hf auth login."
    by_hand = f"On a machine with a network: hf download {hub_id}"
    if kind == "model":
        remedy = f"Check the name. {login}" if unknown else f"{by_hand} --local-dir FOLDER. Then give that FOLDER."
        return MissingModelError(f"'{hub_id}' is not a folder here, and it cannot be downloaded: {reason_of(error)}", remedy)
    remedy = f"{by_hand} --repo-type dataset --local-dir FOLDER. Then use the .pt file in it."
    if unknown:
        remedy = f"Check the name; a generator needs no download, and is given to --model. {login}"
    return MissingDataError(f"The dataset '{hub_id}' cannot be downloaded: {reason_of(error)}", remedy)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
