"""Files of data sets on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from kvloom.errors import DataError


def hub_file(repository: str, name: str) -> Path:
    """A file of a data set on the hub, downloaded once.

    Args:
        repository: of the data set.
        name: of the file in it.

    Raises:
        DataError: the hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(
            f"{name} of {repository} cannot be taken from the hub ({reason}): name a folder of local files with --data."
        ) from error
