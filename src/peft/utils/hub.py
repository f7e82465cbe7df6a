# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Asking and uploading to the hub; downloading is done where files are read."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, file_exists, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .warning import warn


CARD = "README.md"


def push_folder(
    saved: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
    **save_options: Any,
) -> CommitInfo:
    """
    Save something to a folder, and upload it to the hub in one commit. A model card that is there keeps its text.

    Args:
        saved: what has `save_pretrained`.
        repo_id: id of the repository; it is made if it is missing.
        commit_message: first line of the commit's message.
        commit_description: the rest of it.
        private: whether a new repository is private.
        token: token for the hub; True for the one that is stored on this machine.
        revision: branch to commit to; it is made if it is missing.
        create_pr: open a pull request instead of committing to the branch.
        tags: added to those of the model card.
        save_options: for `save_pretrained`.

    Returns:
        The commit; as a string it is its address.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        card = os.path.join(folder, CARD)
        try:
            shutil.copyfile(api.hf_hub_download(repo_id, CARD, revision=revision), card)
        except (EntryNotFoundError, LocalEntryNotFoundError):
            pass  # the repository has none yet
        saved.save_pretrained(folder, **save_options)
        if tags and os.path.isfile(card):
            content = ModelCard.load(card, ignore_metadata_errors=True)
            content.data.tags = sorted({*(content.data.get("tags") or ()), *tags})
            content.save(card)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(saved).__name__}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """
    Say whether a repository on the hub has a file.

    Args:
        repo_id: id of the repository.
        filename: name of the file.
        kwargs: `revision`, `subfolder`, `token`, `cache_dir` and `local_files_only`; others have no effect.

    Returns:
        None if it cannot be known, because the hub is not there to ask and the file is not in the cache.
    """
    path = "/".join(part for part in (kwargs.get("subfolder"), filename) if part)
    revision = kwargs.get("revision")
    if isinstance(try_to_load_from_cache(repo_id, path, cache_dir=kwargs.get("cache_dir"), revision=revision), str):
        return True
    if HF_HUB_OFFLINE or kwargs.get("local_files_only"):
        return None
    try:
        return file_exists(repo_id, path, revision=revision, token=kwargs.get("token"))
    except Exception as error:  # the hub's client has dozens of classes for 'cannot be had'
        warn(f"the hub could not be asked whether {repo_id} has {path}: {error}")
        return None
