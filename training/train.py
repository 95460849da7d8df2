"""Train the small Mixture-of-Experts model on the text of corpus.py and export it in Hugging Face form.

    python training/train.py --data build/training --steps 2000

continues from build/training/checkpoint.pt if there is one, exports every --export-every steps, and appends a line of
JSON to build/training/log.jsonl each time. README.md has run times and results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a spinning second thread stalls where cores are shared

import numpy as np
import torch
from export import export
from network import Geometry, SmallMoe, balance_loss, sequence_information
from torch import Tensor
from torch.nn import functional

BATCH, LENGTH = 16, 384
PEAK_RATE = 4e-3
WARM_UP_STEPS = 100
COOL_DOWN = 0.4  # the last part of the steps, in which the rate falls to zero
BALANCE_WEIGHT = 0.01
LOG_EVERY = 50
HELD_OUT_ROWS = 16
ACTIVE_BATCH, ACTIVE_DRAWS = 8, 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("build/training"), help="folder of corpus.npz, and for results"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--information", type=float, default=0.05, help="weight of the reward for sequence information")
    parser.add_argument("--export-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    run = Run(args.data, args.steps, args.information, args.seed)
    started_s, first = time.monotonic(), run.step
    while run.step < args.steps:
        figures = run.train_step()
        if run.step % LOG_EVERY == 0:
            rate = (run.step - first) * BATCH * LENGTH / (time.monotonic() - started_s)
            print(f"step {run.step}: {figures} {rate / 1e3:.1f} kB/s", flush=True)
        if run.step % args.export_every == 0 or run.step == args.steps:
            run.save(figures)


class Run:
    """Model, optimizer and position in the training text; starts from the folder's checkpoint if there is one."""

    def __init__(self, folder: Path, steps: int, information: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.folder, self.steps, self.information, self.seed = folder, steps, information, seed
        self.model = SmallMoe(Geometry())
        self.text = dict(np.load(folder / "corpus.npz"))
        self.kinds = sorted(self.text)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
        self.step = 0
        self.seconds = 0.0
        self.running_loss = math.nan
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def train_step(self) -> str:
        """One step of AdamW; returns its figures as text."""
        began_s = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK_RATE * self._rate()
        tokens = self._batch()
        logits, routings = self.model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        balance, information = balance_loss(routings), sequence_information(routings)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + BALANCE_WEIGHT * balance - self.information * information).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        bits = loss.item() / math.log(2)
        self.running_loss = bits if math.isnan(self.running_loss) else 0.98 * self.running_loss + 0.02 * bits
        self.seconds += time.monotonic() - began_s
        return f"{self.running_loss:.3f} bits/byte, balance {balance:.2f}, information {information:.2f}"

    def save(self, figures: str) -> None:
        """Export the model, write the checkpoint, log what held-out text gives."""
        export(self.model, self.folder / "model")
        entry = {
            "steps": self.step,
            "planned_steps": self.steps,
            "batch": BATCH,
            "length": LENGTH,
            "seed": self.seed,
            "information_weight": self.information,
            "balance_weight": BALANCE_WEIGHT,
            "seconds": round(self.seconds),
            "figures": figures,
            "held_out": self._held_out(),
        }
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        print(entry, flush=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        part = self.checkpoint.with_suffix(".part")
        torch.save(state | {"step": self.step, "seconds": self.seconds}, part)
        part.rename(self.checkpoint)

    def _rate(self) -> float:
        """Warm-up, plateau, then linearly to zero."""
        left = (self.steps - self.step) / (COOL_DOWN * self.steps)
        return min(1.0, (self.step + 1) / WARM_UP_STEPS, left)

    def _batch(self) -> Tensor:
        """int64 [BATCH, LENGTH + 1]: random windows, each kind as often as another, a function of the step's number."""
        rng = np.random.default_rng([self.seed, self.step])
        rows = []
        for kind in rng.permutation(np.resize(self.kinds, BATCH)):
            stream = self.text[kind]
            start = rng.integers(len(stream) - LENGTH)
            rows.append(stream[start : start + LENGTH + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    @torch.no_grad()
    def _held_out(self) -> dict[str, Any]:
        """On text that was not trained on: bits per byte of each kind, and the distinct experts, a layer, of batches of
        tokens from mixed sequences and from sequences of one kind."""
        bits, chosen = {}, []
        for kind, stream in np.load(self.folder / "heldout.npz").items():
            rows = torch.from_numpy(stream[: HELD_OUT_ROWS * (LENGTH + 1)].astype(np.int64)).view(HELD_OUT_ROWS, -1)
            logits, routings = self.model(rows[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            bits[kind] = round(loss.item() / math.log(2), 3)
            chosen.append(torch.stack([routing.chosen for routing in routings], 2).numpy())
        of_kind = np.stack(chosen)  # [kinds, rows, T, L, k]
        mixed = of_kind.reshape(1, -1, *of_kind.shape[2:])
        return {
            "bits_per_byte": bits,
            "active_experts_of_batch": ACTIVE_BATCH,
            "active_experts_mixed": active_experts(mixed),
            "active_experts_of_one_kind": active_experts(of_kind),
        }


def active_experts(chosen: np.ndarray) -> float:
    """Mean distinct experts a layer of ACTIVE_BATCH tokens, each of another sequence of the same pool.

    chosen: [pools, sequences, T, L, k].
    """
    rng = np.random.default_rng(0)
    counts = []
    for draw in range(ACTIVE_DRAWS):
        sequences = chosen[draw % len(chosen)]
        rows = rng.choice(len(sequences), ACTIVE_BATCH, replace=False)
        tokens = sequences[rows, rng.integers(sequences.shape[1], size=ACTIVE_BATCH)]  # [batch, L, k]
        counts.append(np.mean([len(np.unique(tokens[:, layer])) for layer in range(tokens.shape[1])]))
    return round(float(np.mean(counts)), 2)


if __name__ == "__main__":
    main()
