"""SampleTable: what is written is what a sequential program would have stored, wherever the rows live."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from torch import Tensor

from wellposed.sample_table import SampleTable, last_valid_occurrence


@pytest.fixture
def unchecked():
    """Let bad arguments reach our own errors: jaxtyping would refuse them first."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def make(storage: str, tmp_path: Path, rows: int = 7, shape: tuple[int, ...] = (3,), **settings) -> SampleTable:
    path = tmp_path / "table.npy" if storage == "memmap" else None
    return SampleTable(rows, shape, storage=storage, path=path, **settings)


STORAGES = pytest.mark.parametrize("storage", ["device", "cpu", "memmap"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def write_sequentially(rows: Tensor, index: Tensor, new: Tensor) -> tuple[Tensor, int]:
    """The specification: one row after the other, leaving out those that are not finite."""
    rows, skipped = rows.clone(), 0
    for i, row in zip(index.tolist(), new.to(rows.dtype), strict=True):
        if bool(row.isfinite().all()):
            rows[i] = row
        else:
            skipped += 1
    return rows, skipped


@given(
    index=st.lists(st.integers(0, 5), max_size=12),
    bad=st.lists(st.booleans(), min_size=12, max_size=12),
    shape=st.sampled_from([(), (1,), (3,), (2, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    as_on_an_accelerator=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_equals_writing_the_rows_one_after_the_other(index, bad, shape, dtype, as_on_an_accelerator):
    generator = torch.Generator().manual_seed(len(index))
    table = SampleTable(6, shape, dtype=dtype, fill=0.5)
    if as_on_an_accelerator:
        table._write_winners = table._write_without_waiting
    positions = torch.tensor(index, dtype=torch.int64)
    for _ in range(2):
        new = torch.randn(len(index), *shape, generator=generator)
        for k in range(len(index)):
            if bad[k]:
                new[k].view(-1)[-1] = (math.nan, math.inf, -math.inf)[k % 3]
        expected, skipped = write_sequentially(table.rows, positions, new)
        before = int(table.skipped)
        table.write(positions, new)
        assert torch.equal(table.rows, expected)
        assert int(table.skipped) - before == skipped
    written = {i for i, b in zip(index, bad, strict=False) if not b}
    assert set(table.visited.nonzero().flatten().tolist()) == written


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=20))
@settings(deadline=None, max_examples=60)
def test_last_valid_occurrence_by_its_definition(entries):
    index = torch.tensor([i for i, _ in entries], dtype=torch.int64)
    valid = torch.tensor([v for _, v in entries], dtype=torch.bool)
    expected = [max((k for k, (j, v) in enumerate(entries) if j == i and v), default=-1) for i, _ in entries]
    assert last_valid_occurrence(index, valid).tolist() == expected


@STORAGES
@DTYPES
def test_reads_float32_copies_of_what_was_written(storage, dtype, tmp_path):
    table = make(storage, tmp_path, dtype=dtype)
    rows = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    table.write(torch.tensor([6, 2], dtype=torch.int32), rows.double())
    back = table.read(torch.tensor([2, 6]))
    assert back.dtype == torch.float32
    assert torch.equal(back, rows.flip(0).to(dtype).float())
    back.zero_()
    assert bool(table.read(torch.tensor([2])).any())  # a copy
    assert table.seen(torch.tensor([0, 2])).tolist() == [False, True]
    assert not table.rows.requires_grad


def test_half_precision_errs_by_at_most_the_documented_amount():
    rows = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0))
    for dtype, bound in ((torch.float16, 2.5e-4), (torch.bfloat16, 2e-3)):
        table = SampleTable(1000, (1,), dtype=dtype)
        table.write(torch.arange(1000), rows)
        assert float((table.read(torch.arange(1000)) - rows).abs().max()) <= bound


def test_a_row_that_overflows_the_storage_dtype_is_not_finite():
    table = SampleTable(2, (), dtype=torch.float16, fill=1.0)
    table.write(torch.tensor([0, 1]), torch.tensor([1e6, 2.0]))
    assert table.rows.tolist() == [1.0, 2.0]
    assert table.visited.tolist() == [False, True]
    assert int(table.skipped) == 1


def test_written_rows_carry_no_graph():
    rows = torch.ones(1, 3, requires_grad=True)
    table = SampleTable(2, (3,))
    table.write(torch.tensor([0]), rows * 2)
    loss = (table.read(torch.tensor([0])) * rows).sum()
    table.write(torch.tensor([0]), rows * 5)  # an in-place write between forward and backward
    loss.backward()
    assert rows.grad is not None and rows.grad.tolist() == [[2.0, 2.0, 2.0]]


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.half(), lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.float64)],
)
@DTYPES
def test_converting_the_module_leaves_the_storage_alone(convert, dtype):
    table = SampleTable(3, (2,), dtype=dtype)
    table.write(torch.tensor([1]), torch.tensor([[0.1, 0.2]]))
    before = table.rows.clone()
    convert(torch.nn.Sequential(table, torch.nn.Linear(1, 1)))
    assert table.rows.dtype == dtype and torch.equal(table.rows, before)
    assert table.visited.dtype == torch.bool and table.skipped.dtype == torch.int64


@pytest.mark.parametrize("storage, device", [("device", "meta"), ("cpu", "cpu"), ("memmap", "cpu")])
def test_only_device_storage_moves_with_the_module(storage, device, tmp_path):
    table = make(storage, tmp_path).to("meta")
    assert {table.rows.device.type, table.visited.device.type, table.skipped.device.type} == {device}


@STORAGES
def test_state_dict_round_trip(storage, tmp_path):
    table = make(storage, tmp_path, dtype=torch.bfloat16)
    table.write(torch.tensor([1, 4]), torch.tensor([[1.0, 2.0, 3.0], [float("inf"), 0.0, 0.0]]))
    stream = io.BytesIO()
    torch.save(table.state_dict(), stream)
    stream.seek(0)
    (tmp_path / "other").mkdir()
    other = make(storage, tmp_path / "other", dtype=torch.bfloat16)
    other.load_state_dict(torch.load(stream, weights_only=True), assign=True)
    for name in ("rows", "visited", "skipped"):
        assert torch.equal(getattr(other, name), getattr(table, name))
    if storage == "memmap":  # the file has it, too
        assert np.load(tmp_path / "other" / "table.visited.npy").tolist() == table.visited.tolist()


@STORAGES
def test_refuses_a_checkpoint_of_another_shape_and_names_both(storage, tmp_path):
    saved = SampleTable(50, (10,))
    table = make(storage, tmp_path)
    with pytest.raises(RuntimeError, match=r"holds 50 rows of shape \(10,\), this table has 7 rows of shape \(3,\)"):
        table.load_state_dict(saved.state_dict())
    saved.save(tmp_path / "saved.pt")
    with pytest.raises(ValueError, match=r"holds 50 rows of shape \(10,\), this table has 7 rows of shape \(3,\)"):
        table.load(tmp_path / "saved.pt")


@STORAGES
def test_a_table_that_is_not_persistent_is_saved_by_hand(storage, tmp_path):
    table = make(storage, tmp_path, persistent=False)
    assert table.state_dict() == {}
    table.write(torch.tensor([3]), torch.ones(1, 3))
    table.save(tmp_path / "saved.pt")
    expected = table.rows.clone()
    table.reset()
    assert not table.visited.any() and not table.rows.any()
    table.load(tmp_path / "saved.pt")
    assert torch.equal(table.rows, expected) and int(table.visited.sum()) == 1
    assert [p.name for p in tmp_path.glob("*.new")] == []


@DTYPES
def test_a_memory_mapped_table_reopens_with_its_content(dtype, tmp_path):
    first = make("memmap", tmp_path, dtype=dtype, fill=0.25)
    first.write(torch.tensor([5]), torch.full((1, 3), 0.5))
    first.flush()
    second = make("memmap", tmp_path, dtype=dtype, fill=0.25)
    assert torch.equal(second.rows, first.rows)
    assert float(second.rows[0, 0]) == 0.25 and second.visited.tolist() == first.visited.tolist()
    with pytest.raises(
        ValueError, match=r"table.npy holds .* of shape \(7, 3\), this table needs .* of shape \(8, 3\)"
    ):
        make("memmap", tmp_path, rows=8, dtype=dtype)


def test_a_new_memory_map_is_sparse(tmp_path):
    table = make("memmap", tmp_path, rows=1_000_000, shape=(10,))
    status = (tmp_path / "table.npy").stat()
    assert status.st_size > 40_000_000 and status.st_blocks * 512 < 1_000_000
    assert not table.visited.any()


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "table.npy").write_bytes(b"something else")
    with pytest.raises(ValueError, match="table.npy is not a complete .npy file"):
        make("memmap", tmp_path)


@STORAGES
def test_a_deep_copy_is_independent(storage, tmp_path):
    table = make(storage, tmp_path)
    table.write(torch.tensor([0]), torch.ones(1, 3))
    twin = copy.deepcopy(table)
    twin.write(torch.tensor([0]), torch.zeros(1, 3))
    assert table.rows[0].tolist() == [1.0, 1.0, 1.0] and twin.rows[0].tolist() == [0.0, 0.0, 0.0]
    assert twin.storage != "memmap"


@pytest.mark.parametrize(
    "index, message",
    [
        (torch.tensor([50000]), r"SampleTable: index must lie in \[0, 50000\), got 50000; num_rows is the size of the"),
        (torch.tensor([0, -1]), r"index must lie in \[0, 50000\), got -1"),
        (None, "got None; IndexedDataset and TensorLoader yield it"),
        ([1, 2], r"got \[1, 2\]"),
        (torch.tensor([0.0]), "torch.float32"),
        (torch.tensor([True]), "torch.bool"),
        (torch.tensor(3), r"1-D int64 tensor .* of shape \(\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_index_is_explained(index, message):
    table = SampleTable(50000, ())
    for use in (table.read, table.seen, lambda i: table.write(i, torch.zeros(1))):
        with pytest.raises(ValueError, match=message):
            use(index)


@pytest.mark.usefixtures("unchecked")
def test_rows_must_match_the_index():
    with pytest.raises(ValueError, match=r"rows must have shape \(2, 3\) for 2 indices, got \(4, 3\)"):
        SampleTable(9, (3,)).write(torch.tensor([0, 1]), torch.zeros(4, 3))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_rows": 0}, "num_rows must be >= 1, got 0"),
        ({"row_shape": (0,)}, "row_shape must hold sizes >= 1"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got torch.float64"),
        ({"fill": float("nan")}, "fill must be finite, got nan"),
        ({"storage": "disk"}, "storage must be 'device', 'cpu' or 'memmap', got 'disk'"),
        ({"storage": "memmap"}, "needs path="),
        ({"path": "x.npy"}, "needs path= and no other storage does"),
        ({"sync": "always"}, "sync must be 'auto' or 'never', got 'always'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        SampleTable(**{"num_rows": 3, "row_shape": (2,), **settings})


SIZES = [(4, 2), (0, 3), (2, 2), (5, 1)]  # examples of each rank, step by step


def batch_of(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    size = SIZES[step][rank]
    rows = torch.randn(size, 2, generator=generator)
    rows[torch.rand(size, generator=generator) < 0.2] = float("nan")
    return torch.randint(0, 6, (size,), generator=generator), rows


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    tables = {
        "float32": SampleTable(6, (2,)),
        "bfloat16": SampleTable(6, (2,), dtype=torch.bfloat16),
        "memmap": SampleTable(6, (2,), storage="memmap", path=f"{folder}/shared.npy"),
        "never": SampleTable(6, (2,), sync="never"),
    }
    for step in range(len(SIZES)):
        for table in tables.values():
            table.write(*batch_of(rank, step))
    torch.save({name: table.state_dict() for name, table in tables.items()}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_end_with_the_table_of_a_single_process(tmp_path):
    world = len(SIZES[0])
    multiprocessing.spawn(run_rank, args=(world, str(tmp_path)), nprocs=world)
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("memmap", torch.float32)):
        alone = SampleTable(6, (2,), dtype=dtype)
        for step in range(len(SIZES)):
            batches = [batch_of(rank, step) for rank in range(world)]
            alone.write(torch.cat([i for i, _ in batches]), torch.cat([r for _, r in batches]))
        for state in states:
            assert torch.equal(state[name]["rows"], alone.rows)
            assert torch.equal(state[name]["visited"], alone.visited)
            assert int(state[name]["skipped"]) == int(alone.skipped) > 0
    assert not torch.equal(states[0]["never"]["rows"], states[1]["never"]["rows"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("storage", ["device", "cpu"])
def test_on_a_gpu_duplicates_are_written_as_on_the_cpu(storage):
    generator = torch.Generator().manual_seed(0)
    index, rows = torch.randint(0, 50, (5000,), generator=generator), torch.randn(5000, 4, generator=generator)
    reference, table = SampleTable(50, (4,)), SampleTable(50, (4,), storage=storage).cuda()
    reference.write(index, rows)
    table.write(index.cuda(), rows.cuda())
    read = table.read(index.cuda())
    assert read.device.type == "cuda" and torch.equal(read.cpu(), reference.read(index))
