import pytest


@pytest.fixture
def page(tmp_path):
    """Makes a report with the markers of an experiment."""

    def make(name):
        path = tmp_path / "results.md"
        path.write_text(f"# Title\n<!-- results:{name} -->\n<!-- /results:{name} -->\nend\n")
        return path

    return make
