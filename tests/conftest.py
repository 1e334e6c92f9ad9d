import matplotlib
import pytest
import tiny
from hypothesis import settings

matplotlib.use("Agg")
settings.register_profile("small", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("small")


@pytest.fixture
def images():
    return tiny.image_set()


@pytest.fixture
def zoo():
    return tiny.zoo()
