"""A medium for vLLM's OffloadingConnector that works on CPU workers: blocks are copied within the worker's memory.

vLLM's own CPU medium needs a GPU. Everything else is vLLM's: what is stored, looked up, loaded and evicted, and when.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

CONNECTOR = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "MemoryOffloadingSpec",
        "spec_module_path": __name__,
        "cpu_bytes_to_use": 64 * 2**20,
    },
}


class MemoryWorker(OffloadingWorker):
    """Copies at once, and reports each copy as finished when it is asked the next time. Sizes and times are made up."""

    def __init__(self, caches: CanonicalKVCaches) -> None:
        self._blocks = [cache.tensor for cache in caches.tensors]
        self._stored: dict[int, list[torch.Tensor]] = {}
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        for block, chunk in _pairs(src_spec, dst_spec):
            self._stored[chunk] = [cache[block].clone() for cache in self._blocks]
        return self._done(job_id)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        for block, chunk in _pairs(dst_spec, src_spec):
            for cache, stored in zip(self._blocks, self._stored[chunk], strict=True):
                cache[block] = stored
        return self._done(job_id)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        pass

    def _done(self, job_id: int) -> bool:
        self._finished.append(TransferResult(job_id=job_id, success=True, transfer_size=1, transfer_time=1.0))
        return True


class MemoryOffloadingSpec(CPUOffloadingSpec):
    """vLLM's CPU medium with another worker."""

    _memory: MemoryWorker | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._memory is None:
            self._memory = MemoryWorker(kv_caches)
        return self._memory


def _pairs(on_device: Any, offloaded: Any) -> list[tuple[int, int]]:
    return list(zip(on_device.block_ids.tolist(), offloaded.block_ids.tolist(), strict=True))
