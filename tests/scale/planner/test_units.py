import pytest
from hypothesis import given
from hypothesis import strategies as st

from dblocks.scale.planner.units import format_bytes, parse_bytes, parse_flops, parse_rate

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20,
         "GiB": 2**30, "TiB": 2**40}  # fmt: skip


def test_sizes_rates_and_speeds_are_exact():
    assert parse_bytes("--memory", "24GiB") == 24 * 2**30
    assert parse_bytes("--memory", "141 GB") == 141 * 10**9
    assert parse_bytes("--memory", ".5KiB") == 512
    assert parse_rate("--link", "50GB/s") == 50e9
    assert parse_rate("--link", "1.5MiB/s") == 1.5 * 2**20
    assert parse_flops("--flops", "400T") == parse_flops("--flops", "400 TFLOP/s") == 4e14
    assert parse_flops("--flops", "2.5P") == 2.5e15
    assert parse_flops("--flops", "1000") == 1000


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)))
def test_a_whole_number_of_units_is_exact(number, unit):
    assert parse_bytes("--memory", f"{number}{unit}") == number * UNITS[unit]


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_bytes, text)
        for text in ("", "24", "24G", "GiB", "-1GiB", "0GiB", "1e3GB", "24gib", "nanGB", "24GiB/s")
    ]
    + [(parse_rate, text) for text in ("50GB", "50", "50GB/h", "0B/s")]
    + [(parse_flops, text) for text in ("400X", "400TB", "0", "inf", "")],
)
def test_anything_else_is_refused_by_name(parse, text):
    with pytest.raises(ValueError, match=r"--option must be .*, above 0, got"):
        parse("--option", text)


def test_sizes_are_written_in_the_largest_unit():
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * 2**29, 5 * 2**40)] == [
        "0 B", "1,023 B", "1.00 KiB", "1.50 GiB", "5.00 TiB",
    ]  # fmt: skip
