"""SampleTable: one row of memory per training example, shared by every method that remembers its predictions.

ELR keeps a running average of each example's prediction, PS-KD the last one, a bilevel tuner one weight:
all of them read some rows, compute, and write them back. The traps are the same for all, and solved here once:
rows must survive a checkpoint, agree on every rank, ignore the non-finite outputs of a skipped AMP step, and
not depend on which of two equal indices the GPU happened to write last.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# What a dtype is called in a .npy file. NumPy has no bfloat16: its bits are stored as 16-bit integers.
_FILE_DTYPE = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2", torch.bool: "|b1"}
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class SampleTable(nn.Module):
    """One row of ``row_shape`` numbers for each of ``num_rows`` training examples.

    Arithmetic is float32: :meth:`read` returns float32 and :meth:`write` casts to the storage ``dtype`` (float16
    errs by at most 2.5e-4 a write on numbers in [0, 1]; bfloat16 by 2e-3). Writing is deterministic on every
    device and equals writing the rows one after the other, leaving out rows that are not finite *in the storage
    dtype*: with duplicate indices the last finite row wins, and a row that is left out keeps its old value and is
    counted in ``skipped``. Under ``torch.distributed`` every rank writes the rows of all ranks, in rank order,
    so that all tables stay identical to that of one process that saw the concatenated batch; ranks may hold
    different numbers of examples (also none), but every rank must call ``write`` equally often.

    Args:
        num_rows: size of the WHOLE training set, not of a batch or of one rank's share.
        row_shape: shape of one row, e.g. ``(num_classes,)``; ``()`` for one number per example.
        dtype: storage: float32, float16 or bfloat16. ``.half()``, ``.double()`` and ``.to(dtype)`` do not change it.
        fill: initial value.
        storage: ``"device"``: a buffer that moves with the module. ``"cpu"``: stays in main memory.
            ``"memmap"``: a file in NumPy's ``.npy`` format, sparse until written (if ``fill`` is 0), re-opened with
            its content when it exists. Ranks of one node may share the file.
        path: the file of ``storage="memmap"``; the visited mask goes to ``<stem>.visited.npy`` beside it.
        sync: ``"auto"`` all-gathers each write when ``torch.distributed`` is initialised, ``"never"`` does not.
        persistent: whether ``state_dict`` holds the table. A large one is better saved apart: :meth:`save`.

    Attributes:
        rows: the stored rows, ``(num_rows, *row_shape)``, in the storage dtype.
        visited: ``(num_rows,)`` bool, true for rows that were ever written.
        skipped: how many rows were not written because they were not finite (0-d int64 tensor).

    Raises:
        ValueError: for an index that is missing, not integer, not 1-D or out of range, rows of another shape, a
            file or a checkpoint with another shape.

    Note:
        The range of an index on the CPU is always checked. On CUDA reading the result back would stall the
        queue at every step, so the check is a device-side assertion: it is reported at a later call and ends the
        process's CUDA context, as PyTorch's own indexing does. Other accelerators have no such assertion and pay
        for the read. A copy or a pickle of a memory-mapped table holds its rows in main memory: two modules must
        never write one file.

    Example:
        >>> table = SampleTable(num_rows=5, row_shape=(2,))
        >>> index = torch.tensor([3, 0, 3])
        >>> table.write(index, torch.tensor([[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]]))
        >>> table.read(torch.tensor([0, 3]))
        tensor([[1., 2.],
                [3., 4.]])
        >>> table.visited
        tensor([ True, False, False,  True, False])
        >>> table.read(torch.tensor([5]))
        Traceback (most recent call last):
        ...
        ValueError: SampleTable: index must lie in [0, 5), got 5; num_rows is the size of the whole training set
    """

    rows: Tensor
    visited: Tensor
    skipped: Tensor

    def __init__(
        self,
        num_rows: int,
        row_shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        fill: float = 0.0,
        storage: Literal["device", "cpu", "memmap"] = "device",
        path: str | Path | None = None,
        sync: Literal["auto", "never"] = "auto",
        persistent: bool = True,
    ) -> None:
        super().__init__()
        _check_settings(num_rows, row_shape, dtype, fill, storage, path, sync)
        self.storage: Literal["device", "cpu", "memmap"] = storage
        self.path = None if path is None else Path(path)
        self.fill, self.sync = float(fill), sync
        self._maps: list[np.memmap[Any, Any]] = []
        shape = (num_rows, *row_shape)
        if self.path is not None:
            rows = self._map(self.path, shape, dtype, self.fill)
            visited = self._map(self.path.with_suffix(".visited.npy"), (num_rows,), torch.bool, 0.0)
        else:
            device = "cpu" if storage == "cpu" else None
            rows = torch.full(shape, self.fill, dtype=dtype, device=device)
            visited = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.register_buffer("rows", rows, persistent=persistent)
        self.register_buffer("visited", visited, persistent=persistent)
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64, device=rows.device), persistent=persistent)

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.rows.shape[1:])

    def read(self, index: Int[Tensor, " batch"], *, device: torch.device | None = None) -> Float[Tensor, "batch ..."]:
        """Return the rows of ``index`` as a float32 copy on ``device`` (default: where ``index`` is)."""
        target = index.device if device is None and isinstance(index, Tensor) else device
        index = self._local(index)
        if self.rows.device.type == "cpu" and target is not None and target.type == "cuda":
            # Gather straight into page-locked memory: the copy to the GPU is then asynchronous. Page-locking the
            # table itself would gain nothing more and take gigabytes from the operating system.
            out = torch.empty((len(index), *self.row_shape), dtype=self.rows.dtype, pin_memory=True)
            torch.index_select(self.rows, 0, index, out=out)
            return out.to(target, non_blocking=True).float()
        return self.rows.index_select(0, index).to(device=target, dtype=torch.float32)

    def seen(self, index: Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Return, on ``index``'s device, whether each row was ever written."""
        target = index.device if isinstance(index, Tensor) else None
        return self.visited.index_select(0, self._local(index)).to(device=target)

    @torch.no_grad()
    def write(self, index: Int[Tensor, " batch"], rows: Float[Tensor, "batch ..."]) -> None:
        """Store ``rows`` (any float dtype and device; detached) at ``index``; see the class for the semantics."""
        local = self._local(index)
        if rows.shape != (len(local), *self.row_shape):
            raise ValueError(
                f"SampleTable: rows must have shape {(len(local), *self.row_shape)} for {len(local)} indices, "
                f"got {tuple(rows.shape)}"
            )
        stored = rows.detach().to(self.rows.dtype)  # cast first: 1e6 is finite in float32 and not in float16
        if self.sync == "auto" and _world_size() > 1:
            gathered, stored = gather_over_ranks(index.to(stored.device), stored)
            local = gathered.to(self.rows.device)
        self._store(local, stored.to(self.rows.device))

    def _store(self, index: Tensor, rows: Tensor) -> None:
        # 0 * x is 0 for what is finite and NaN for the rest; many times faster on a CPU than isfinite().all().
        zeros = rows * 0
        finite = (zeros if rows.ndim == 1 else zeros.flatten(1).sum(dim=1)) == 0
        winner = last_valid_occurrence(index, finite)
        self.skipped += (~finite).sum()
        write = self._write_winners if rows.device.type == "cpu" else self._write_without_waiting
        write(index, rows, winner)

    def _write_winners(self, index: Tensor, rows: Tensor, winner: Tensor) -> None:
        kept = winner == torch.arange(len(index), device=index.device)
        if not bool(kept.all()):
            index, rows = index[kept], rows[kept]
        self.rows.index_copy_(0, index, rows)
        self.visited.index_fill_(0, index, True)

    def _write_without_waiting(self, index: Tensor, rows: Tensor, winner: Tensor) -> None:
        replaced = winner >= 0
        old = self.rows.index_select(0, index)
        new = torch.where(replaced.view(-1, *[1] * (rows.ndim - 1)), rows[winner.clamp(min=0)], old)
        # index_put_ with duplicates is not deterministic on CUDA. Here equal indices carry equal values, so the
        # order does not matter; dropping the duplicates instead would need their number, which stalls the GPU.
        self.rows.index_put_((index,), new)
        self.visited.index_put_((index,), replaced | self.visited.index_select(0, index))

    def _local(self, index: Tensor) -> Tensor:
        """Check ``index`` and bring it to the table's device as int64."""
        dtype = getattr(index, "dtype", None)
        if dtype not in (torch.int64, torch.int32, torch.int16) or index.ndim != 1:
            got = repr(index) if dtype is None else f"{dtype} of shape {tuple(index.shape)}"
            raise ValueError(
                f"SampleTable: index must be a 1-D int64 tensor of positions in the training set, got {got}; "
                "IndexedDataset and TensorLoader yield it with each batch"
            )
        local = index.to(device=self.rows.device, dtype=torch.int64)
        check_range(index if index.device.type == "cpu" else local, len(self))
        return local

    def reset(self) -> None:
        """Forget everything: all rows are ``fill`` again, and none is visited."""
        self.rows.fill_(self.fill)
        self.visited.zero_()
        self.skipped.zero_()

    def save(self, path: str | Path) -> None:
        """Write rows, mask and counter to one file, replaced at once; for ``persistent=False``."""
        draft = Path(f"{path}.{os.getpid()}.new")
        torch.save({"rows": self.rows, "visited": self.visited, "skipped": self.skipped}, draft)
        os.replace(draft, path)

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote, in whatever storage and device this table has."""
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if saved["rows"].shape != self.rows.shape:
            raise ValueError(self._shape_message(str(path), saved["rows"].shape))
        for name in ("rows", "visited", "skipped"):
            getattr(self, name).copy_(saved[name])

    def flush(self) -> None:
        """Write a memory-mapped table's pending pages to disk; nothing to do for the others."""
        for mapped in self._maps:
            mapped.flush()

    def extra_repr(self) -> str:
        """Describe the table in ``print(module)``."""
        return f"{len(self)}, {self.row_shape}, dtype={self.rows.dtype}, storage={self.storage!r}"

    def _map(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> Tensor:
        mapped = open_memory_map(path, shape, dtype, fill)
        self._maps.append(mapped)
        return _as_tensor(mapped, dtype)

    def _shape_message(self, source: str, shape: Sequence[int]) -> str:
        return (
            f"SampleTable: {source} holds {shape[0]} rows of shape {tuple(shape[1:])}, this table has {len(self)} rows "
            f"of shape {self.row_shape}; num_rows is the size of the whole training set"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SampleTable:
        held = {name: self._buffers.pop(name) for name in ("rows", "visited", "skipped")}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(held)
        if self.storage == "device":
            for name, tensor in held.items():
                assert tensor is not None
                self._buffers[name] = _move(tensor, fn)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rows = state_dict.get(prefix + "rows")
        if rows is not None and rows.shape != self.rows.shape:
            error_msgs.append(self._shape_message("the checkpoint", rows.shape))
            return
        # assign=True would swap the buffer for the checkpoint's tensor: another dtype, another place, no file.
        metadata = {**local_metadata, "assign_to_params_buffers": False}
        arguments = (state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.storage == "memmap":
            state.update(storage="cpu", path=None, _maps=[])
        return state


def last_valid_occurrence(index: Int[Tensor, " batch"], valid: Bool[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """For each entry, the position of the last valid entry with the same index, or -1 if there is none.

    Deterministic, vectorised, and without a data-dependent shape (so it never waits for a GPU).

    Example:
        >>> last_valid_occurrence(torch.tensor([4, 7, 4, 7]), torch.tensor([True, True, True, False]))
        tensor([2, 1, 2, 1])
    """
    ordered, order = torch.sort(index, stable=True)
    group = torch.zeros_like(order)
    group[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    candidate = torch.where(valid[order], order, -1)
    last = torch.full_like(order, -1).scatter_reduce_(0, group, candidate, "amax")
    return torch.empty_like(order).scatter_(0, order, last[group])


def check_range(index: Int[Tensor, " batch"], num_rows: int) -> None:
    """Raise ValueError unless ``0 <= index < num_rows``; on CUDA a device-side assertion that does not wait."""
    if index.numel() == 0:
        return
    message = f"SampleTable: index must lie in [0, {num_rows})"
    low, high = index.aminmax()
    if index.device.type == "cuda":
        torch._assert_async((low >= 0) & (high < num_rows), message)
    elif int(low) < 0 or int(high) >= num_rows:
        worst = int(low) if int(low) < 0 else int(high)
        raise ValueError(f"{message}, got {worst}; num_rows is the size of the whole training set")


def gather_over_ranks(
    index: Int[Tensor, " batch"], rows: Float[Tensor, "batch ..."]
) -> tuple[Int[Tensor, " total"], Float[Tensor, "total ..."]]:
    """All ranks' ``(index, rows)``, concatenated in rank order; ranks may hold different numbers of rows.

    Two collectives: the sizes, then index and rows packed as bytes (one message instead of two, in the storage
    dtype, and every backend can send bytes) and padded to the largest size.
    """
    device = _communication_device(rows.device)
    size = torch.tensor([len(index)], device=device)
    sizes = [torch.empty_like(size) for _ in range(_world_size())]
    torch.distributed.all_gather(sizes, size)
    counts = [int(s) for s in sizes]
    width = math.prod(rows.shape[1:]) * rows.element_size()
    payload = torch.zeros(max(counts), 8 + width, dtype=torch.uint8, device=device)
    payload[: len(index), :8] = index.to(torch.int64).contiguous().view(torch.uint8).view(-1, 8).to(device)
    payload[: len(index), 8:] = rows.contiguous().view(-1).view(torch.uint8).view(-1, width).to(device)
    parts = [torch.empty_like(payload) for _ in counts]
    torch.distributed.all_gather(parts, payload)
    packed = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    all_index = packed[:, :8].reshape(-1).view(torch.int64).to(index.device)
    all_rows = packed[:, 8:].reshape(-1).view(rows.dtype).view(-1, *rows.shape[1:]).to(rows.device)
    return all_index, all_rows


def open_memory_map(path: Path, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> np.memmap[Any, Any]:
    """Open a ``.npy`` file for reading and writing; create it (sparse if ``fill`` is 0) where there is none."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.{os.getpid()}.new")
        created = np.lib.format.open_memmap(draft, mode="w+", dtype=_FILE_DTYPE[dtype], shape=shape)
        if fill != 0.0:
            _as_tensor(created, dtype).fill_(fill)
        created.flush()
        try:
            os.link(draft, path)  # fails, where a rename would replace, if another rank was first
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    try:
        mapped = np.lib.format.open_memmap(path, mode="r+")
    except ValueError as error:
        raise ValueError(f"SampleTable: path {path} is not a complete .npy file: {error}") from error
    if mapped.shape != shape or mapped.dtype != np.dtype(_FILE_DTYPE[dtype]):
        raise ValueError(
            f"SampleTable: path {path} holds {mapped.dtype} of shape {mapped.shape}, this table needs "
            f"{np.dtype(_FILE_DTYPE[dtype])} of shape {shape}; delete the file or name another"
        )
    return mapped


def _as_tensor(mapped: np.memmap[Any, Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(mapped).view(dtype)


def _move(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    # Module.half() and friends convert floating tensors and move all of them. Shown as integers, the rows are
    # moved only; Module.type(), which converts integers too, is caught by the change of dtype.
    bits = tensor.view(_BITS[tensor.dtype]) if tensor.is_floating_point() else tensor
    moved = fn(bits)
    return moved.view(tensor.dtype) if moved.dtype == bits.dtype else tensor.to(moved.device)


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _communication_device(device: torch.device) -> torch.device:
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_settings(
    num_rows: int,
    row_shape: Sequence[int],
    dtype: torch.dtype,
    fill: float,
    storage: str,
    path: str | Path | None,
    sync: str,
) -> None:
    if num_rows < 1:
        raise ValueError(f"SampleTable: num_rows must be >= 1, got {num_rows}")
    if any(size < 1 for size in row_shape):
        raise ValueError(f"SampleTable: row_shape must hold sizes >= 1, got {tuple(row_shape)}")
    if dtype not in _BITS:
        raise ValueError(f"SampleTable: dtype must be float32, float16 or bfloat16, got {dtype}")
    if not math.isfinite(fill):
        raise ValueError(f"SampleTable: fill must be finite, got {fill}")
    if storage not in ("device", "cpu", "memmap"):
        raise ValueError(f"SampleTable: storage must be 'device', 'cpu' or 'memmap', got {storage!r}")
    if (storage == "memmap") != (path is not None):
        raise ValueError(f"SampleTable: storage='memmap' needs path= and no other storage does, got path={path!r}")
    if sync not in ("auto", "never"):
        raise ValueError(f"SampleTable: sync must be 'auto' or 'never', got {sync!r}")
