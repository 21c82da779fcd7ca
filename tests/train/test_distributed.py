# SPDX-License-Identifier: Apache-2.0
"""Two processes on this machine, as `torchrun` starts them."""

import subprocess
import sys
from pathlib import Path

import torch

PROGRAM = """
import sys
import torch
import torch.distributed as dist
import pfnas_fast as pf
from pfnas_fast.train.distributed import average_gradients, rank_and_size, start_processes

start_processes("cpu")
rank, size = rank_and_size()
assert size == 2
net = torch.nn.ModuleList([torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)])
net[0](torch.full((1, 2), float(rank))).sum().backward()
average_gradients(net)
assert net[0].weight.grad.tolist() == [[0.5, 0.5]]
assert net[1].weight.grad is None
torch.manual_seed(rank)
data = pf.load_detection(sys.argv[1])
supernet = pf.DetectionSupernet(pf.load_space("tiny"), num_classes=2, backend="reference")
pf.train(supernet, data.fit, steps=2, batch_size=2, run=pf.Run(sys.argv[2]))
torch.save(dict(supernet.named_parameters()), f"{sys.argv[2]}/rank{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_hold_the_same_weights(toy_detection: Path, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=127.0.0.1:0", str(script), str(toy_detection), str(tmp_path)]
    subprocess.run(launcher, check=True, capture_output=True, timeout=300)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "checkpoints" / "train.pt").exists()
