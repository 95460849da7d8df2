"""Times the connector's table of expert counts on the CPU and prints the rows as JSON. Needs PyTorch.

Run it with: python -m eldr.evaluate.capture
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from eldr.engines.vllm.table import BlockTable

LAYERS, EXPERTS, TOP_K = 48, 128, 8
BLOCKS, BLOCK_TOKENS = 2048, 16
PROMPT_TOKENS = (128, 512, 2048)
REPEATS = 15


def median_us(call: Callable[[], object]) -> float:
    """Median wall-clock time of a call in microseconds, after one warm-up call."""
    call()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    rows = []
    for tokens in PROMPT_TOKENS:
        table = BlockTable(BLOCKS, BLOCK_TOKENS, LAYERS, EXPERTS, device="cpu")
        blocks = rng.choice(BLOCKS, -(-tokens // BLOCK_TOKENS), replace=False)
        slots = (blocks[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(-1)[:tokens]
        chosen = np.argsort(rng.random((tokens, LAYERS, EXPERTS)), axis=-1)[..., :TOP_K]
        slots_tensor, experts_tensor = torch.from_numpy(slots), torch.from_numpy(chosen)
        listed = blocks.tolist()
        for what, call in (
            ("add the experts of a prompt to its rows", lambda: table.add(slots_tensor, experts_tensor)),  # noqa: B023
            ("sum the rows of a prompt", lambda: table.sum(listed, tokens)),  # noqa: B023
        ):
            table.take(listed, loaded=False)
            rows.append({"what": what, "prompt_tokens": tokens, "p50_us": median_us(call)})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
