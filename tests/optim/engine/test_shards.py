"""What is held here of a tensor whose rows are spread; what many processes make of it: tests/distributed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lowmem
from lowmem.errors import UserError
from lowmem.memory.count import model_state_bytes, state_bytes
from lowmem.optim.blocks import Dense, Slice, matrix_shape
from lowmem.optim.shards import Shape, Shard, local, resized, shard_of, total, whole


@pytest.mark.parametrize(("rows", "ranks"), [(5, 4), (1, 3), (12, 4), (7, 2)])
def test_rows_are_those_of_torch_chunk(rows: int, ranks: int) -> None:
    weight = torch.arange(rows * 3).view(rows, 3)
    chunks = [*weight.chunk(ranks), *[weight[:0]] * ranks][:ranks]
    for rank, chunk in enumerate(chunks):
        shard = Shard.of(weight.shape, ranks, rank)
        assert torch.equal(shard.own(weight), chunk)
        assert tuple(shard.shape) == tuple(chunk.shape)


def test_a_shape_of_rows_is_a_tuple_that_knows_the_whole() -> None:
    shard = Shard.of((10, 2, 3), 4, 1)
    shape = matrix_shape(shard.shape)
    m, n = shape
    assert (m, n) == shape == (3, 6)
    assert whole(shape) == (10, 6)
    assert whole(resized(shape, 2)) == (10, 2)
    for copied in (copy.deepcopy(shape), pickle.loads(pickle.dumps(shape))):
        assert isinstance(copied, Shape)
        assert copied.shard == shape.shard


def test_the_side_of_a_projection_is_that_of_the_whole_matrix() -> None:
    matrix = lowmem.create("galore", rank=2).rules["matrix"]
    tall, rows = (40, 16), Shard.of((40, 16), 4, 0).shape  # of which ten rows are here: wide
    assert matrix.projector.low_shape(tall) == (40, 2)
    assert matrix.projector.low_shape(rows) == (10, 2)


def test_nothing_is_reduced_over_a_tensor_that_is_all_here() -> None:
    x = torch.ones(3)
    assert total((4, 3), x) is x
    assert local(x) is x
    assert shard_of(x) is None


def test_rows_of_a_drawn_matrix_are_those_of_the_whole() -> None:
    g = Dense(torch.arange(30.0).view(10, 3))
    part = Slice(g, Shard.of((10, 3), 4, 2).shape)
    assert torch.equal(part.rows(1, 3), g.rows(7, 9))
    assert torch.equal(part.chunk(2, 7), g.chunk(20, 25))


def test_a_rule_that_says_nothing_is_stepped_whole_on_every_rank() -> None:
    shard = Shard.of((64, 64), 2, 0)
    smmf, galore = lowmem.create("smmf"), lowmem.create("galore", rank=4)
    assert smmf.way("matrix", "matrix", shard) == "whole"
    assert galore.way("matrix", "matrix", shard) == "rows"
    assert state_bytes(smmf, (64, 64), ranks=2) == state_bytes(smmf, (64, 64))


def test_shards_that_start_inside_a_block_follow_the_rule_of_small_tensors() -> None:
    strategy = lowmem.create("adamw_8bit")
    assert strategy.rule_name("matrix", (100, 100), Shard.of((100, 100), 2, 0)) == "small"
    assert strategy.rule_name("matrix", (128, 128), Shard.of((128, 128), 2, 0)) == "matrix"


def test_bytes_of_ranks_add_up_where_all_is_divided() -> None:
    adamw, age = lowmem.create("adamw"), 4
    of_ranks = [state_bytes(adamw, (37, 12), ranks=4, rank=rank) - age for rank in range(4)]
    assert sum(of_ranks) == state_bytes(adamw, (37, 12)) - age
    model = nn.Linear(12, 37)
    assert model_state_bytes(adamw, model, ranks=4) == of_ranks[0] + age + 8 * 10 + age


@pytest.mark.parametrize(("ranks", "rank"), [(0, 0), (2, 2), (2, -1)])
def test_a_rank_that_is_none_is_refused(ranks: int, rank: int) -> None:
    with pytest.raises(UserError, match="ranks"):
        state_bytes(lowmem.create("adamw"), (4, 4), ranks=ranks, rank=rank)


@pytest.mark.parametrize(
    ("mark", "says"),
    [("_is_flat_param", "version 1"), ("_fsdp_flattened", "version 1"), ("ds_id", "Speed")],
)
def test_engines_that_flatten_parameters_are_refused(mark: str, says: str) -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    setattr(p, mark, True)
    with pytest.raises(UserError, match=says):
        lowmem.optimizer([p], "adamw").step()
