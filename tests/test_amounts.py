"""Tests of numbers of bytes and files as a person reads them."""

from job import amounts


def test_size_has_the_largest_unit_of_which_it_has_one() -> None:
    numbers = (0, 1, 999, 1000, 144_248, 1e6, 1.99e9, 3.2e12)
    shown = ["0 bytes", "1 byte", "999 bytes", "1.0 kB", "144.2 kB", "1.0 MB", "2.0 GB", "3,200.0 GB"]
    assert [amounts.size(number) for number in numbers] == shown


def test_one_file_is_not_several() -> None:
    assert [amounts.files(number) for number in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]
