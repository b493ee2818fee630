"""The Hugging Face Hub: what names a repository, downloads, uploads, and what its errors mean.

Everything goes through huggingface_hub: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN mean here
what they mean there.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, constants
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
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRANSPORT = ("httpx", "httpx2", "requests", "urllib3", "huggingface_hub", "hf_xet")
_UNREACHED = ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError")
_LOGIN = "set HF_TOKEN or run `hf auth login`"


def split_repository(name: str) -> tuple[str, str | None] | None:
    """``owner/name[@revision]`` -> (repository, revision); None for anything else.

    >>> split_repository("me/ranker@v1")
    ('me/ranker', 'v1')
    """
    found = _REPOSITORY.fullmatch(name)
    if found is None or ".." in name:
        return None
    return found[1], found[2]


def download(
    repository: str,
    wanted: Sequence[tuple[str, ...]],
    optional: Sequence[str] = (),
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Path:
    """Bring files of one commit of a repository into the cache.

    Args:
        repository: ``owner/name``.
        wanted: file names that must be there; of each tuple the first that the repository has.
        optional: file names that may be missing.
        revision: branch, tag or commit; None is the main branch.
        cache_dir: as in huggingface_hub.
        token: as in huggingface_hub.

    Returns:
        The folder that holds them.

    Raises:
        FileNotFoundError: there is no such repository, revision or file, or it is not in the cache
            while HF_HUB_OFFLINE is set.
        PermissionError: the token is refused, or does not suffice.
        ConnectionError: the Hub cannot be reached, breaks off, has an error or asks to slow down.
    """
    folder: Path | None = None
    at = revision
    with hub_errors(repository, revision):
        for names in [*wanted, *((name,) for name in optional)]:
            path = next(
                filter(None, (_pull(repository, n, at, cache_dir, token) for n in names)), None
            )
            if path is None and names[0] not in optional:
                raise _missing(repository, names, revision)
            if path is not None and folder is None:
                folder = path.parent
                if _COMMIT.fullmatch(folder.name):
                    at = folder.name  # a push in between must not mix two commits
    if folder is None:
        raise ValueError("download needs at least one wanted file.")
    return folder


def _pull(
    repository: str,
    name: str,
    revision: str | None,
    cache_dir: str | None,
    token: str | None,
) -> Path | None:
    """One file; None when the repository has none of that name, or the cache of an offline user."""
    if revision is not None and _COMMIT.fullmatch(revision):
        known = huggingface_hub.try_to_load_from_cache(
            repository, name, cache_dir=cache_dir, revision=revision
        )
        if known is not None and not isinstance(known, str):
            return None  # a mark that this commit has no such file
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repository,
                name,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                library_name="ltrp-timm",
            )
        )
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            return None
        raise  # the Hub did not answer: that says nothing about the file
    except EntryNotFoundError:
        return None


def _missing(repository: str, names: Sequence[str], revision: str | None) -> FileNotFoundError:
    at = repository if revision is None else f"{repository}@{revision}"
    if constants.HF_HUB_OFFLINE:
        return FileNotFoundError(_not_cached(at, f"the {names[0]} of "))
    return FileNotFoundError(
        f"{at} on the Hub holds no {' or '.join(names)}: check that it is what you want to load."
    )


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
    """Put files into a repository in one commit; it is created when missing.

    Args:
        folder: where the files are.
        names: the files.
        repository: ``owner/name``, or a name of one's own.
        private: whether a new repository is hidden; None leaves it to the account's setting.
        token: as in huggingface_hub; it needs the right to write.
        revision: the branch, created when missing; None is the main branch.
        overwrite: replace files that the branch holds.
        keep: names that stay as they are on the branch, instead of an error.

    Returns:
        ``owner/name``.

    Raises:
        FileExistsError: the branch holds one of the files and ``overwrite`` is False.
        PermissionError: the token is refused or may not write.
        ConnectionError: the Hub cannot be reached, breaks off, has an error or asks to slow down.
    """
    api = huggingface_hub.HfApi(token=token, library_name="ltrp-timm")
    with hub_errors(repository, revision):
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        present: set[str] = set()
        if revision is None or api.revision_exists(repository, revision):
            present = set(api.list_repo_files(repository, revision=revision)) & set(names)
        else:  # what a new branch starts with stays on the one it comes from
            api.create_branch(repository, branch=revision)
        if present - set(keep) and not overwrite:
            raise FileExistsError(
                f"{repository} already holds {' and '.join(sorted(present - set(keep)))}; "
                "pass overwrite=True (--overwrite) to replace."
            )
        sent = [name for name in names if overwrite or name not in present]
        api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in sent],
            commit_message=f"Upload {', '.join(sent)}",
            revision=revision,
        )
    return repository


@contextlib.contextmanager
def hub_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Say what the Hub's errors mean in one sentence, with the repository and the remedy.

    Errors that are not the Hub's pass as they are.

    Raises:
        FileNotFoundError: there is no such repository, revision or file.
        PermissionError: the token is refused, or does not suffice.
        ConnectionError: the Hub cannot be reached, breaks off, has an error or asks to slow down.
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
    cause = error.__cause__
    if cause is not None and isinstance(error, (LocalEntryNotFoundError, RuntimeError)):
        return _meaning(cause, name, revision)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return FileNotFoundError(_not_cached(at))
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{name}"
        return PermissionError(f"{name} is gated: accept its terms at {page}, then {_LOGIN}.")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"{name} has no revision {revision!r}: name a branch, tag or commit."
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"the Hub shows no repository {name}: check the name, or {_LOGIN} if it is private."
        )
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError(f"{at} on the Hub holds no file of that name: {first_line(error)}")
    if isinstance(error, HFValidationError):
        return ValueError(f"{name!r} cannot name a repository: {first_line(error)}")
    if isinstance(error, HfHubHTTPError):
        return _meaning_of_status(error, name)
    broken = str(error).startswith("Consistency check failed")
    if not broken and type(error).__module__.split(".")[0] not in _TRANSPORT:
        return None
    if isinstance(error, FileMetadataError):
        return ConnectionError(
            f"what answers at {constants.ENDPOINT} for {name} is no Hub: check HF_ENDPOINT."
        )
    if type(error).__name__ in _UNREACHED:
        return ConnectionError(
            f"the Hub at {constants.ENDPOINT} cannot be reached for {name}: check the connection, "
            "or set HF_HUB_OFFLINE=1 to use what is in the cache."
        )
    return ConnectionError(
        f"the transfer of {name} broke off, nothing half-written is left, run it again: "
        f"{first_line(error)}"
    )


def _meaning_of_status(error: HfHubHTTPError, name: str) -> Exception:
    response = error.response
    status = response.status_code if response is not None else 0
    if status == 401:
        return PermissionError(f"the Hub wants a token that is valid for {name} (401): {_LOGIN}.")
    if status == 403:
        return PermissionError(
            f"this account or token has no right to do that with {name} (403): use a token that "
            "has (https://huggingface.co/settings/tokens)."
        )
    if status == 429:
        wait = response.headers.get("Retry-After")
        when = f"in {wait} s" if wait else "later"
        return ConnectionError(f"the Hub asks to slow down at {name} (429): try again {when}.")
    if status >= 500:
        return ConnectionError(
            f"the Hub has a fault of its own at {name} ({status}): try again later."
        )
    return ConnectionError(f"the Hub refused a request for {name} ({status}): {first_line(error)}")
