"""Files for repositories on the Hugging Face hub, by huggingface_hub. The token is the hub's own: HF_TOKEN, or a login.

No text of an error holds the token: a client may show what it was sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from raylora.errors import HubError, UserError, one_line

MAX_NAME = 96
"""Characters of a repository's name on the hub, without its owner."""
ROOM = 24
"""Of these, what is kept for a dataset's name at least."""


def check_push(option: str, repository: str) -> None:
    """Check what can be checked without asking the hub: the name, and whether there is a token.

    Args:
        option: that named the repository, for error messages.

    Raises:
        UserError: it is no ``ORG/NAME``, there is no token, or the hub must not be asked.
    """
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    place = f"{option} {repository}"
    if repository.count("/") != 1:
        raise UserError(f"{place}: expected ORG/NAME, an owner on the hub and how its repositories' names begin")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{place}: no name for a repository: {one_line(error)}") from None
    if len(repository.partition("/")[2]) > MAX_NAME - ROOM:
        raise UserError(f"{place}: longer than {MAX_NAME - ROOM} characters, which leaves no room for datasets' names")
    if is_offline_mode():
        raise UserError(f"{place}: HF_HUB_OFFLINE is set, which forbids to ask the hub")
    if not _token():
        raise UserError(f"{place}: no token of the hub: set HF_TOKEN, or log in with `hf auth login`")


def push_files(repository: str, files: Mapping[str, bytes | Path], message: str, public: bool) -> str:
    """Make a model's repository, if there is none, and put these files into it in one commit; others stay.

    Args:
        files: the content, or a local file, by the name in the repository.
        public: whether a repository that is made can be seen by everybody.

    Returns:
        The commit's hash.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    token = _token()
    try:
        api = HfApi(token=token)
        api.create_repo(repository, private=not public, exist_ok=True)
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        return str(api.create_commit(repository, operations, commit_message=message).oid)
    except Exception as error:  # the hub's client, httpx and hf-xet below it each raise errors of their own
        raise HubError(_without_token(one_line(error), token), _is_of_all(error)) from error


def repository_url(repository: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def _is_of_all(error: Exception) -> bool:
    """Whether the hub does not answer at all, or refuses the token."""
    import httpx

    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, httpx.TransportError) or status in (401, 403)


def _token() -> str | None:
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception as error:  # a token that a service of CI hands out may be refused in any way
        raise UserError(f"no token of the hub: {one_line(error)}") from error


def _without_token(text: str, token: str | None) -> str:
    """The text without the token, whole, as Python shows it, or cut off where the text ends."""
    if not token:
        return text
    for shown in {token, repr(token)[1:-1], token.encode("unicode_escape").decode()}:
        text = text.replace(shown, "...")
        for size in range(len(shown) - 1, 7, -1):  # the text was cut to a length
            if text.endswith(shown[:size]):
                text = f"{text[:-size]}..."
                break
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "...", text)
