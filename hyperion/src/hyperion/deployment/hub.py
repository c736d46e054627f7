"""Upload of an artifact to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable

from hyperion_core.artifact import Artifact
from hyperion_core.errors import ArtifactError


def push(artifact: Artifact, repo_id: str, *, private: bool | None, log: Callable[[str], None]) -> str:
    """Create the repository where there is none, and upload the artifact, without its checkpoints; gives the URL.

    A name without an owner is created under the account that is logged in.

    Raises:
        ArtifactError: the Hub refuses, or cannot be reached. The artifact stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    log(f"uploading to {repo_id}")
    try:
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=artifact.folder,
            commit_message="Upload a model tuned with Hyperion",
            ignore_patterns=["checkpoint-*/*", ".*"],
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ArtifactError(
            f"the artifact could not be uploaded to {repo_id}",
            why=" ".join(str(error).split())[:300],
            fix=f"log in with `hf auth login`, then: hf upload {repo_id} {artifact.folder}; nothing was lost",
        ) from error
    return str(created)
