from __future__ import annotations

from pathlib import Path

import pytest

from kvloom import Plan
from tests.evaluate.tasks.data import write_gsm8k
from tests.evaluate.tiny_folder import save_tiny


@pytest.fixture(scope="session")
def home(fetched, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny models, a plan for each, and GSM8K rows."""
    made = tmp_path_factory.mktemp("home")
    for name, layers in (("tiny", 2), ("deep", 3)):
        Plan.uniform(save_tiny(made / name, layers), 2, 2).save(made / f"k2-{name}.json")
    write_gsm8k(made / "data")
    return made
