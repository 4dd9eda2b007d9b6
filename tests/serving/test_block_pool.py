"""Blocks of cache: references counted, full blocks found again, nothing lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4lib.serving.block_pool import BlockPool, chain


@given(st.lists(st.sampled_from(["allocate", "share", "release", "publish"]), max_size=80), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_pool_counts_references(operations, dice):
    pool, held, keys = BlockPool(5, 2), [], 0
    for op in operations:
        if op == "allocate" and pool.n_free:
            held.append(pool.allocate())
        elif op == "share" and held:
            held.append(dice.choice(held))
            pool.share(held[-1])
        elif op == "release" and held:
            pool.release(held.pop(dice.randrange(len(held))))
        elif op == "publish" and held:
            pool.publish(dice.choice(held), b"%d" % (keys := keys + 1))
        assert pool.n_free == 5 - len(set(held))
        assert all(pool.references(b) == held.count(b) for b in range(5))
        assert all(pool.find(key) == block for block, key in pool._key.items()) and len(pool._key) == len(pool._block)


def test_a_free_block_is_found_until_it_is_needed():
    pool = BlockPool(3, 2)
    a, b = pool.allocate(), pool.allocate()
    pool.publish(a, b"a"), pool.publish(b, b"b")
    pool.release(a), pool.release(b)
    assert pool.n_free == 3 and pool.find(b"a") == a
    pool.share(a)                                                  # out of the free ones again, content and all
    assert pool.n_free == 2 and pool.references(a) == 1
    assert pool.allocate() == 2                                    # one without a key goes first,
    assert pool.allocate() == b and pool.find(b"b") is None        # then the one that was free longest


def test_blocks_are_forgotten_in_the_order_they_became_free():
    pool = BlockPool(3, 2)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.publish(block, b"%d" % block)
    for block in (1, 2, 0):
        pool.release(block)
    assert [pool.allocate() for _ in range(3)] == [1, 2, 0]


def test_a_key_names_all_tokens_before_it():
    assert chain(chain(b"", [1, 2]), [3, 4]) == chain(chain(b"", range(1, 3)), (3, 4))
    assert len({chain(b"", [1, 2]), chain(b"", [2, 1]), chain(b"", [1]), chain(chain(b"", [1]), [2]),
                chain(chain(b"", [5, 6]), [3, 4]), chain(chain(b"", [1, 2]), [3, 4])}) == 6


def test_of_two_blocks_with_the_same_tokens_the_first_is_found():
    pool = BlockPool(2, 2)
    a, b = pool.allocate(), pool.allocate()
    pool.publish(a, b"x"), pool.publish(b, b"x")
    assert pool.find(b"x") == a
    pool.release(b), pool.forget(b)
    assert pool.find(b"x") == a
    pool.forget(a)
    assert pool.find(b"x") is None


@pytest.mark.parametrize("act, words", [
    (lambda: BlockPool(0, 4), "n_blocks=0"), (lambda: BlockPool(1, 4).release(0), "block 0 is already free"),
    (lambda: BlockPool(1, 4).share(0), "block 0 is free and cannot be shared"),
    (lambda: [pool.allocate() for pool in [BlockPool(1, 4)] for _ in range(2)], "no free block among 1")])
def test_misuse_is_named(act, words):
    with pytest.raises(ValueError, match=words):
        act()
