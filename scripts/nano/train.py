"""Trains the nano model, one stage per call; scripts/nano/README.md has the order and purpose of the stages.

    python -m scripts.nano.train {base,tower,way,read} RUN [--minutes N] [--processes N]
    python -m scripts.nano.train export RUN OUT [--mean-with SAVE...]   # writes a run as a checkpoint
    python -m scripts.nano.train restore RUN CHECKPOINT                # restores a run from a checkpoint

Every stage saves RUN/<stage>.pt repeatedly and appends its curve to RUN/<stage>.jsonl. A restarted stage continues from
its last save.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from scripts.nano.export import export, restore
from scripts.nano.trainer import STAGES, Trainer


def main() -> None:
    options = _arguments()
    if options.stage == "export":
        export(options.run, options.out, options.mean_with)
        return
    options.run.mkdir(parents=True, exist_ok=True)
    if options.stage == "restore":
        restore(options.out, options.run)
        return
    if options.processes > 1:
        options.rendezvous = f"file:///tmp/nano-{os.getpid()}"
        torch.multiprocessing.spawn(_work, (options,), nprocs=options.processes)
    else:
        _work(0, options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "export", "restore"])
    parser.add_argument("run", type=Path, help="directory of the run's weights and curves")
    parser.add_argument("out", type=Path, nargs="?", help="the checkpoint that export writes and restore reads")
    parser.add_argument("--minutes", type=float, default=20, help="length of the whole schedule")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes, one thread each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=int, default=8192, help="padded positions a process takes in one step")
    parser.add_argument("--rate", type=float, default=0.0, help="learning rate of the matrices; 0: the stage's own")
    parser.add_argument("--adapter-rate", type=float, default=2.0, help="of the other matrices' learning rate")
    parser.add_argument(
        "--eye-every",
        type=int,
        default=5,
        help="read: the eye learns in one step of so many; 1: from the start",
    )
    parser.add_argument("--mean-with", type=Path, nargs="*", default=[], help="export: other saves of the last stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-fuse", action="store_true", help="without torch.compile")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps")
    return parser.parse_args()


def _work(rank: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    if options.processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=options.rendezvous, rank=rank, world_size=options.processes
        )
    Trainer(rank, options).train()


if __name__ == "__main__":
    main()
