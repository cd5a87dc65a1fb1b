"""Bundles of a small network that can be cut, and images for it."""

import pytest
from split_network import IMAGES, write_bundle, write_patient_bundle

from offramp.runtime import Session, read_bundle


@pytest.fixture(scope="session")
def folder(shared):
    """A bundle whose samples leave everywhere."""
    return shared("split", lambda folder: write_bundle(folder / "small")) / "small"


@pytest.fixture(scope="session")
def patient_folder(tmp_path_factory):
    """A bundle whose policy remembers what earlier exits said."""
    made = tmp_path_factory.mktemp("offload") / "patient"
    write_patient_bundle(made)
    return made


@pytest.fixture(scope="session")
def bundle(folder):
    return read_bundle(folder)


@pytest.fixture(scope="session")
def images():
    """120 of them."""
    return IMAGES


@pytest.fixture(scope="session")
def whole(bundle):
    """What the undivided network answers."""
    return Session(bundle, threads=1).run(IMAGES)
