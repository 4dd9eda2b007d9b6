"""Numbers as text: prefixes roll over, rounding never prints a thousand of anything."""

import pytest

from gpt4lib import format as fmt


@pytest.mark.parametrize("value, text", [
    (0, "0"), (7, "7"), (999, "999"), (999.95, "1.00 k"), (1000, "1.00 k"), (999_499, "999 k"), (999_500, "1.00 M"),
    (55.8e9, "55.8 B"), (1.8326e12, "1.83 T"), (-2.5e6, "-2.50 M"), (1.5e16, "15000 T"), (float("nan"), "nan")])
def test_count(value, text):
    assert fmt.count(value) == text


def test_units():
    assert (fmt.bytes_si(3.665e12), fmt.bytes_si(512), fmt.bytes_iec(2**30)) == ("3.67 TB", "512 B", "1.00 GiB")
    assert (fmt.flop(5.6e11), fmt.flop_rate(312e12), fmt.flop(2.15e25)) == ("560 GFLOP", "312 TFLOP/s", "21.5 YFLOP")
    assert (fmt.dollars(63e6), fmt.dollars(0.0049), fmt.percent(0.3546)) == ("$63.0 M", "$0.0049", "35.5 %")


@pytest.mark.parametrize("value, text", [(0, "0 s"), (95 * 86400, "95 d"), (5400, "1.5 h"), (90, "1.5 min"), (0.0125, "12.5 ms"),
                                         (2e-6, "2 us"), (3e-9, "3 ns")])
def test_seconds(value, text):
    assert fmt.seconds(value) == text


def test_tables_align_and_wide_characters_count_twice():
    assert fmt.table([("a", "1"), ("专家", "22")], ("x", "n"), right=(1,)) == (
        "x      n\n----  --\na      1\n专家  22")
    assert fmt.table([]) == ""
