"""The Hugging Face Hub: names of repositories, downloads, uploads, and errors in one sentence.

Everything goes through huggingface_hub, which also reads HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and
HF_TOKEN.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ltrp_timm.weights.untrusted import first_line

PREFIX = "hf-hub:"
_REPOSITORY = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?")
_TRANSPORT = ("httpx", "httpx2", "requests", "urllib3", "huggingface_hub", "hf_xet")
_UNREACHED = ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError")
_LOGIN = "set HF_TOKEN or run `hf auth login`"


def split_repository(name: str) -> tuple[str, str | None] | None:
    """``owner/name[@revision]`` -> (repository, revision); None for any other text.

    >>> split_repository("me/ranker@v1")
    ('me/ranker', 'v1')
    """
    found = _REPOSITORY.fullmatch(name)
    if found is None or ".." in name:
        return None
    return found[1], found[2]


def download(
    repository: str,
    patterns: Sequence[str],
    weights: Sequence[str],
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Path:
    """Download config.json and weights of one commit; returns their folder in the cache.

    The last of the files ``weights`` is downloaded only if the others are missing. Errors are as of
    ``hub_errors``.
    """
    options: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "library_name": "ltrp-timm"}
    pull = partial(huggingface_hub.snapshot_download, repository, **options)
    offline, wanted, commit = constants.HF_HUB_OFFLINE, list(patterns), revision
    with hub_errors(repository, revision):
        for last in ([], [weights[-1]]):  # in the same commit
            folder = Path(
                pull(revision=commit, allow_patterns=wanted + last, local_files_only=offline)
            )
            commit = folder.name
            if any((folder / name).is_file() for name in weights):
                break
    for names in (("config.json",), weights):
        if not any((folder / name).is_file() for name in names):
            at = repository if revision is None else f"{repository}@{revision}"
            text = f"{at} on the Hub holds no {' or '.join(names)}: check its name."
            raise FileNotFoundError(_not_cached(at, f"the {names[0]} of ") if offline else text)
    return folder


def _not_cached(at: str, part: str = "") -> str:
    return f"{part}{at} is not in the cache and HF_HUB_OFFLINE is set: unset it once to download."


def upload(
    folder: Path,
    names: Sequence[str],
    repository: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    keep: Sequence[str] = (),
) -> str:
    """Upload files to a repository in one commit; the repository is created if it is missing.

    ``keep`` are files that stay as they are on the branch, instead of an error; ``push_to_hub``
    describes the other arguments, the result and the errors.
    """
    api = huggingface_hub.HfApi(token=token, library_name="ltrp-timm")
    with hub_errors(repository, revision):
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        present: set[str] = set()
        if revision is None or api.revision_exists(repository, revision):
            present = set(api.list_repo_files(repository, revision=revision)) & set(names)
        else:  # a new branch starts with the files of the main one, which stay there
            api.create_branch(repository, branch=revision)
        if present - set(keep) and not overwrite:
            raise FileExistsError(
                f"{repository} already holds {' and '.join(sorted(present - set(keep)))}; "
                "pass overwrite=True (--overwrite) to replace."
            )
        sent = [name for name in names if overwrite or name not in present]
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=sent,
            commit_message=f"Upload {', '.join(sent)}",
            revision=revision,
        )
    return f"{PREFIX}{repository}" + (f"@{revision}" if revision else "")


@contextlib.contextmanager
def hub_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Turn the Hub's errors into one sentence with the repository and the remedy.

    Other errors pass unchanged.

    Raises:
        FileNotFoundError: the repository, the revision or a file does not exist.
        PermissionError: the token is refused or not sufficient.
        ConnectionError: the Hub cannot be reached, breaks off, has an error or is busy.
    """
    try:
        yield
    except Exception as error:
        meaning = _meaning(error, repository, revision)
        if meaning is None:
            raise
        raise meaning from error


def _meaning(error: BaseException, name: str, revision: str | None) -> Exception | None:
    """The error to raise instead; None for one that is not the Hub's."""
    at = name if revision is None else f"{name}@{revision}"
    cause, said, hub = error.__cause__, first_line(error), constants.ENDPOINT
    if cause is not None and isinstance(error, (LocalEntryNotFoundError, RuntimeError)):
        return _meaning(cause, name, revision)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return FileNotFoundError(_not_cached(at))
    if isinstance(error, GatedRepoError):
        text = f"{name} is gated: accept its terms at {hub}/{name}, then {_LOGIN}."
        return PermissionError(text)
    if isinstance(error, RevisionNotFoundError):
        text = f"{name} has no revision {revision!r}: name a branch, tag or commit."
        return FileNotFoundError(text)
    if isinstance(error, RepositoryNotFoundError):
        text = f"the Hub shows no repository {name}: check the name, or {_LOGIN} if it is private."
        return FileNotFoundError(text)
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError(f"{at} on the Hub does not hold this file: {said}")
    if isinstance(error, HFValidationError):
        return ValueError(f"{name!r} cannot name a repository: {said}")
    if isinstance(error, HfHubHTTPError):
        return _meaning_of_status(error, name)
    broken = str(error).startswith("Consistency check failed")
    if not broken and type(error).__module__.split(".")[0] not in _TRANSPORT:
        return None
    text = f"the transfer of {name} broke off and left no partial file; run it again: {said}"
    if isinstance(error, FileMetadataError):
        text = f"the server at {hub} is not a Hub: check HF_ENDPOINT ({name})."
    elif type(error).__name__ in _UNREACHED:
        text = f"the Hub at {hub} cannot be reached for {name}: check the connection, or set "
        text += "HF_HUB_OFFLINE=1 to use what is in the cache."
    return ConnectionError(text)


def _meaning_of_status(error: HfHubHTTPError, name: str) -> Exception:
    response = error.response
    status = response.status_code if response is not None else 0
    if status == 401:
        return PermissionError(f"the Hub wants a valid token for {name} (401): {_LOGIN}.")
    if status == 403:
        text = f"the token lacks the right to do this with {name} (403): use one that has it "
        return PermissionError(f"{text}(https://huggingface.co/settings/tokens).")
    text = f"the Hub refused a request for {name} ({status}): {first_line(error)}"
    if status == 429:
        wait = response.headers.get("Retry-After")
        when = f"in {wait} s" if wait else "later"
        text = f"the Hub is busy with requests for {name} (429): try again {when}."
    elif status >= 500:
        text = f"the Hub has an internal error for {name} ({status}): try again later."
    return ConnectionError(text)
