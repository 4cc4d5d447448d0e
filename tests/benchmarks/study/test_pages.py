import pytest

from benchmarks.study.pages import write_between_markers


def test_text_goes_between_the_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- a:b -->\nold\n<!-- /a:b -->\nafter\n")
    for _ in range(2):
        write_between_markers(path, "a:b", "new\n")
        assert path.read_text() == "before\n<!-- a:b -->\nnew\n<!-- /a:b -->\nafter\n"


@pytest.mark.parametrize(
    "text", [None, "", "<!-- a:b -->", "<!-- /a:b --><!-- a:b -->", "<!-- a:b -->" * 2]
)
def test_missing_markers_are_a_clear_error(tmp_path, text):
    path = tmp_path / "README.md"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"must hold the lines <!-- a:b --> and <!-- /a:b -->"):
        write_between_markers(path, "a:b", "new")
    assert path.exists() == (text is not None)
