import pytest

from tests.interop.theirs import UNETS, make, save


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(the network, its folder)."""
    net = make(UNETS["small"])
    return net, save(net, tmp_path_factory.mktemp("small") / "pipeline")
