"""Keep tensors in the host's memory while the device computes."""

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Host(Protocol):
    """A place to store tensors in and take them back from."""

    def put(self, tensor: Tensor) -> Any:
        """Begin to store `tensor`, and return the handle that `fetch` and `take` need."""

    def fetch(self, stored: Any) -> None:
        """Begin to copy a stored tensor back, so that `take` need not wait."""

    def take(self, stored: Any) -> Tensor:
        """Return a stored tensor on its device, ready for the stream that computes."""


class _Stored:
    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        # Only pinned memory is copied while the device computes; torch reuses pinned blocks in the next step.
        pinned = tensor.device.type == "cuda"
        self.host = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=pinned
        )
        self.back: Tensor | None = None
        self.copied: torch.cuda.Event | None = None


class PinnedHost:
    """A host store that copies on two streams of its own, one for each direction; on a CPU, by plain copies."""

    def __init__(self) -> None:
        self._streams: dict[str, torch.cuda.Stream] = {}

    def put(self, tensor: Tensor) -> _Stored:
        stored = _Stored(tensor)
        if tensor.device.type != "cuda":
            stored.host.copy_(tensor)
            return stored
        stream = self._stream("out")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            stored.host.copy_(tensor, non_blocking=True)
        stored.copied = stream.record_event()
        tensor.record_stream(stream)  # its memory must not be given to another tensor before it is copied
        return stored

    def fetch(self, stored: _Stored) -> None:
        if stored.back is not None:
            return
        if stored.device.type != "cuda":
            stored.back = stored.host.clone()
            return
        # Allocated on the stream that computes, which frees it too; the copy waits for earlier uses of this memory.
        stored.back = torch.empty_strided(
            stored.host.shape, stored.host.stride(), dtype=stored.host.dtype, device=stored.device
        )
        stream = self._stream("back")
        assert stored.copied is not None
        stream.wait_event(stored.copied)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            stored.back.copy_(stored.host, non_blocking=True)
        stored.copied = stream.record_event()

    def take(self, stored: _Stored) -> Tensor:
        self.fetch(stored)
        if stored.copied is not None:
            torch.cuda.current_stream().wait_event(stored.copied)
        assert stored.back is not None
        back, stored.back = stored.back, None
        back.record_stream(torch.cuda.current_stream()) if back.is_cuda else None
        return back

    def _stream(self, direction: str) -> torch.cuda.Stream:
        if direction not in self._streams:
            self._streams[direction] = torch.cuda.Stream()
        return self._streams[direction]


def memory_limit(own: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of host memory that this process may use: all, or less where a control group limits it.

    Slurm and containers set such limits. The file `own` lists the process's control groups, whose folders are below
    `groups` (cgroups of Linux, version 2 or 1).
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        root, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            file = folder / name
            if controllers in ("", "memory") and file.is_relative_to(root) and file.exists():
                limit = file.read_text().strip()
                limits += [int(limit)] if limit != "max" else []
    return min(limits)
