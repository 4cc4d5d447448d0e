import pytest


@pytest.fixture
def pages(tmp_path):
    """Makes a README and a report with the markers of an experiment."""

    def make(name):
        paths = tmp_path / "README.md", tmp_path / "docs" / "results.md"
        paths[1].parent.mkdir()
        for path in paths:
            path.write_text(f"# Title\n<!-- results:{name} -->\n<!-- /results:{name} -->\nend\n")
        return paths

    return make
