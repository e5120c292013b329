"""The image, built once for all tests that need it."""

import pytest

from tests.kubernetes import images


@pytest.fixture(scope="session")
def podman() -> images.Podman:
    """podman with a store of its own."""
    return images.prepare()


@pytest.fixture(scope="session")
def image(podman: images.Podman) -> str:
    """The name of the image, built from this checkout."""
    return images.build(podman)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give whoever comes first the time that the build takes."""
    for item in items:
        if "image" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(900))
