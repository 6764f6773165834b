"""Sending an exported folder to the Hugging Face hub, whose token and address are those of the environment."""

from pathlib import Path
from typing import Any

from latentae.errors import RequestError
from latentae.loading.card import MARK
from latentae.version import __version__


def check_upload(repo: str) -> None:
    """Refuse what cannot be sent before any work is done: no name of a repository, no token, no network wanted.

    Raises:
        RequestError: one of these, with what to do.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RequestError(f"{repo!r} is no name of a repository: expected USER/NAME, or NAME for your own.") from error
    if HF_HUB_OFFLINE:
        raise RequestError("HF_HUB_OFFLINE is set, so nothing can be sent to the hub: unset it, or export to DIR only.")
    if get_token() is None:
        raise RequestError(
            "Sending to the Hugging Face hub needs a token that may write: set HF_TOKEN, or run 'hf auth login' once."
        )


def push_folder(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Send a folder of `export` to the hub in one commit, its card naming the repository; returns the address.

    Args:
        repo: USER/NAME, or NAME of the token's user; made if it is not there.
        private: of a repository that is made; an old one stays as it is.

    Raises:
        RequestError: the hub refuses, or cannot be reached; the folder stays.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        added = [CommitOperationAdd(p.relative_to(folder).as_posix(), _content(p, url.repo_id)) for p in files]
        api.create_commit(url.repo_id, added, commit_message=f"Exported by latentae {__version__}")
    except Exception as error:  # the hub client raises its own errors and those of several other packages
        lines = (getattr(error, "server_message", None) or str(error) or type(error).__name__).strip().splitlines()
        raise RequestError(
            f"{folder} is written, but {api.endpoint} did not take it as {repo} ({lines[0]}): see that the token may "
            f"write there and that there is a network; 'hf upload {repo} {folder}' sends it then."
        ) from error
    return str(url)


def _content(path: Path, repo: str) -> Any:
    """A file, or the text of a card of ours, which says how to open FOLDER."""
    if path.name != "README.md" or MARK not in (text := path.read_text(encoding="utf-8")):
        return path
    return text.replace('"FOLDER"', f'"{repo}"').encode()
