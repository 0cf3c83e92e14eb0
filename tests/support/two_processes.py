"""A script as two processes under gloo, and as one: what each of the three ends with."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

_BEFORE = """
import sys
import torch
import torch.distributed as dist

rank, world, folder, *arguments = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
"""
_AFTER = """
torch.save(result, f"{folder}/{world}-{rank}.pt")
if world > 1:
    dist.destroy_process_group()
"""


def two_processes_and_one(folder: Path, script: str, *arguments: str, timeout: float = 300) -> tuple[Any, Any, Any]:
    """Run a script three times at once: as rank 0 and rank 1 of two, and alone.

    Args:
        folder: empty, for their files.
        script: finds `rank`, `world`, `arguments`, `torch` and `dist`, the group made, `tests/support` to import from;
            leaves `result`.
        arguments: texts for the script.
        timeout: seconds for each.

    Returns:
        The result of the first rank, of the second, and of the single process.
    """
    path = folder / "rank.py"
    path.write_text(_BEFORE + textwrap.dedent(script) + _AFTER)
    support = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": support}
    runs = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(world), str(folder), *arguments],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]  # fmt: skip
    try:
        for run in runs:
            _, errors = run.communicate(timeout=timeout)
            assert run.returncode == 0, errors
    finally:
        for run in runs:  # a rank whose partner died would wait for it
            if run.poll() is None:
                run.kill()
                run.wait()
    first, second, single = (torch.load(folder / f"{name}.pt") for name in ("2-0", "2-1", "1-0"))
    return first, second, single
