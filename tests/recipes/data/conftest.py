import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What the tests keep is not kept."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DBLOCKS_CACHE", str(folder))
    return folder
