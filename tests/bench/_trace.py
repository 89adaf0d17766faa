"""What one step does on the GPU and asks of it, from torch.profiler's trace."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

Span = tuple[float, float]
SIZES = {"under 4 KiB": 4 << 10, "under 64 KiB": 64 << 10, "under 1 MiB": 1 << 20,
         "under 8 MiB": 8 << 20, "larger": 1 << 60}  # fmt: skip


def traced(function: Callable[[], object]) -> list[dict]:
    """Call it; return the trace's events as Chrome's format has them, with times in us."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def summary(events: Iterable[dict]) -> dict:
    """Return a step's copies, kernels, gaps and calls of CUDA, in ms, MiB and numbers."""
    events = [event for event in events if event.get("ph") == "X" and "cat" in event]
    kernels = [e for e in events if e["cat"] == "kernel"]
    copies = [e for e in events if e["cat"] == "gpu_memcpy"]
    up = [e for e in copies if "HtoD" in e["name"]]
    calls = [e for e in events if e["cat"] in ("cuda_runtime", "cuda_driver")]
    on_gpu = [e for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernel_ms, up_ms = _covered(map(_span, kernels)), _covered(map(_span, up))
    moved = sum(map(_bytes, up))
    return {
        "span ms": round(_length(map(_span, [*on_gpu, *calls])), 2),
        "kernels": len(kernels),
        "kernel ms": round(kernel_ms, 2),
        "up MiB": round(moved / 2**20, 1),
        "up ms": round(up_ms, 2),
        "bus GiB/s": round(moved / 2**30 / (up_ms / 1000), 1) if up_ms else 0.0,
        "both ms": round(kernel_ms + up_ms - _covered(map(_span, [*kernels, *up])), 2),
        "neither ms": round(_length(map(_span, on_gpu)) - _covered(map(_span, on_gpu)), 2),
        "up": _by_size(up),
        "other copies": _by_name(e for e in copies if e not in up),
        "calls": _by_name(calls),
    }


def _span(event: dict) -> Span:
    return event["ts"], event["ts"] + event.get("dur", 0)


def _bytes(event: dict) -> int:
    return event.get("args", {}).get("bytes", 0)


def _length(spans: Iterable[Span]) -> float:
    spans = list(spans)
    return (max(end for _, end in spans) - min(start for start, _ in spans)) / 1000 if spans else 0


def _covered(spans: Iterable[Span]) -> float:
    """Return the milliseconds in which at least one of the spans runs."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1000


def _by_size(copies: list[dict]) -> dict[str, str]:
    """Return number, MiB and ms of copies by where they start and how large they are."""
    rows = defaultdict(list)
    for copy in copies:
        size = next(name for name, limit in SIZES.items() if _bytes(copy) < limit)
        start = "pinned" if "Pinned" in copy["name"] else "pageable"
        rows[f"{start}, {size}"].append(copy)
    return {
        name: f"{len(row)} x, {sum(map(_bytes, row)) / 2**20:.1f} MiB, "
        f"{sum(copy.get('dur', 0) for copy in row) / 1000:.2f} ms"
        for name, row in sorted(rows.items())
    }


def _by_name(events: Iterable[dict]) -> dict[str, str]:
    """Return number, ms in all and longest of the eight kinds that take longest."""
    rows = defaultdict(list)
    for event in events:
        rows[event["name"]].append(event.get("dur", 0) / 1000)
    longest = sorted(rows.items(), key=lambda row: -sum(row[1]))[:8]
    return {
        name: f"{len(row)} x, {sum(row):.2f} ms, longest {max(row):.2f}" for name, row in longest
    }
