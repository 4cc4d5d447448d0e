"""The table of the compiled kernels."""

from tools import compiled


def static(*arguments):
    return compiled("benchmarks.kernels.static", *arguments)


def test_every_launch_has_a_line_with_its_instructions(tmp_path):
    page = tmp_path / "static.md"
    done = static("--widths", "1024", "--case", "gated_residual", "--out", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    lines = [line.split("|")[1:-1] for line in text.splitlines() if "_kernel |" in line]
    assert [line[1].strip() for line in lines[:2]] == ["adaln_fwd_kernel", "adaln_bwd_kernel"]
    assert all(int(line[-1]) > 50 for line in lines)
    assert "| adaln | 4 | 6 | 8 | 12 |" in text


def test_without_launches_nothing_is_written(tmp_path):
    page = tmp_path / "static.md"
    assert static("--case", "no such case", "--out", str(page)).returncode == 1
    assert not page.exists()
