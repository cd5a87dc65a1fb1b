"""Where the project's own files are."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def project():
    return Path(__file__).parents[2]
