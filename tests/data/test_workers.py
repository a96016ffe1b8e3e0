"""Work on many items in threads: its order, its limits and its errors."""

import threading

import pytest

from resnet_jax.data.workers import map_ahead


def test_results_keep_the_order_of_items_and_at_most_so_many_wait():
    asked = 0

    def items():
        nonlocal asked
        for item in range(100):
            asked += 1
            yield item

    results = map_ahead(lambda item: -item, items(), ahead=7)
    assert asked == 0
    for place, result in enumerate(results):
        assert result == -place
        assert asked <= place + 8


def test_an_error_is_raised_in_the_place_of_its_item():
    results = map_ahead(lambda item: 1 / item, (2, 1, 0, 4), ahead=9)
    assert [next(results), next(results)] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_reader_that_stops_does_not_wait_for_items_that_are_not_done():
    blocked = threading.Event()
    results = map_ahead(lambda item: item and blocked.wait(60), (0, 1), ahead=1)
    next(results)
    results.close()
    assert not blocked.is_set()
    blocked.set()
