"""torchvision and timm live in an environment of their own: make test-backbones."""

import pytest

from offramp.model.torchvision_ops import define_missing_ops


@pytest.fixture(scope="session")
def import_or_skip():
    def find(name):
        define_missing_ops()
        return pytest.importorskip(
            name, reason=f"{name} is not installed here: make test-backbones", exc_type=ImportError
        )

    return find
