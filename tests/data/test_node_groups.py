"""`data.node_groups`: with one group for each of 64 nodes, each node reads its own part of the shards."""

import numpy as np
import pytest

from job.data.order import SequenceOrder, rank_slice

NODES, GPUS_PER_NODE, SEQUENCES_PER_GPU = 64, 8, 4
SHARDS, TOKENS, LENGTH = 640, 8193, 64
"""Each shard has 128 sequences."""


def share_read_by_each_node(node_groups: int) -> list[float]:
    """By node: the share of all shards that its ranks take sequences from in one epoch."""
    order = SequenceOrder([TOKENS] * SHARDS, [2 * TOKENS] * SHARDS, LENGTH, 2333, 2**40, node_groups)
    world_size = NODES * GPUS_PER_NODE
    batch = world_size * SEQUENCES_PER_GPU
    read: list[set[int]] = [set() for _ in range(NODES)]
    for position in range(0, order.sequences_per_epoch, batch):
        positions = order.batch_positions(position, batch)
        shards = np.empty(batch, np.int64)
        by_position = np.argsort(positions)
        shards[by_position] = order.sequence_ids(int(positions.min()), batch)[0]
        for rank in range(world_size):
            read[rank // GPUS_PER_NODE] |= set(shards[rank_slice(batch, rank, world_size)].tolist())
    return [len(one) / SHARDS for one in read]


@pytest.mark.parametrize(("node_groups", "least", "most"), [(1, 0.8, 1.0), (NODES, 0.0, 2 / NODES)])
def test_nodes_with_groups_of_their_own_read_their_part_alone(node_groups: int, least: float, most: float) -> None:
    shares = share_read_by_each_node(node_groups)
    assert least <= min(shares)
    assert max(shares) <= most
