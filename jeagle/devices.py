"""GPUs as data: what their makers and those who measured them publish, for ``jeagle plan``.

Rates are peaks of the SXM modules in a machine of eight joined by NVSwitch, without sparsity. Decimal units, as in the
data sheets: 1 TB/s is 1e12 bytes per second.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEVICES", "MEMORY_SHARE", "Device"]

MEMORY_SHARE = 0.9  # of a device's memory, to be filled: the rest is for CUDA, NCCL's buffers and prefill's temporaries


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    memory_bytes: int
    bandwidth: float  # bytes/s of the device's memory
    flops: dict[int, float]  # dense operations/s of the tensor cores, by bits of the operands: 16, and 8 where they can
    link_bandwidth: float  # bytes/s that one device sends over NVLink: half of what data sheets add up, both ways
    link_latency: float  # seconds of one small all-reduce over eight devices
    per_machine: int  # devices that NVLink joins
    sources: tuple[str, ...]

    def peak(self, bits: int) -> float:
        """Operations per second of products with weights of so many bits. Where the tensor cores lack the format, the
        weights are widened to the next one they have."""
        if bits > 16:
            return self.flops[16] / 2  # TF32, which is what "float32" products may use at best
        # int4 is widened to bfloat16: no tensor core of today's multiplies it by activations of 16 bits.
        return self.flops.get(8 if bits == 8 else 16, self.flops[16])


# sglang pull request 2904, "custom allreduce", tp size 8: 5.9 and 5.7 us for sizes 512 and 4,096 on an H100, where
# vLLM's kernel took 10.1 and 9.3.
_ALL_REDUCE_H100 = 5.9e-6

DEVICES: dict[str, Device] = {
    device.name.lower(): device
    for device in (
        Device(
            name="A100",
            memory_bytes=80 * 10**9,
            bandwidth=2.039e12,
            flops={16: 312e12},
            link_bandwidth=300e9,
            link_latency=_ALL_REDUCE_H100,
            per_machine=8,
            sources=(
                "NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM): 2,039 GB/s, BF16 312 TFLOPS, NVLink 600 GB/s",
                "all-reduce: the H100's figure for want of a published one, which flatters the A100",
            ),
        ),
        Device(
            name="H100",
            memory_bytes=80 * 10**9,
            bandwidth=3.35e12,
            flops={16: 989e12, 8: 1979e12},
            link_bandwidth=450e9,
            link_latency=_ALL_REDUCE_H100,
            per_machine=8,
            sources=(
                "NVIDIA H100 Tensor Core GPU data sheet (SXM): 3.35 TB/s, BF16 1,979 and FP8 3,958 TFLOPS with "
                "sparsity, NVLink 900 GB/s",
                "all-reduce: sglang pull request 2904, 5.9 us",
            ),
        ),
        Device(
            name="H200",
            memory_bytes=141 * 10**9,
            bandwidth=4.8e12,
            flops={16: 989e12, 8: 1979e12},
            link_bandwidth=450e9,
            link_latency=_ALL_REDUCE_H100,
            per_machine=8,
            sources=(
                "NVIDIA H200 Tensor Core GPU data sheet (SXM): 141 GB, 4.8 TB/s, arithmetic and NVLink as H100",
                "all-reduce: the H100's, as the links are the same",
            ),
        ),
        Device(
            name="B200",
            memory_bytes=180 * 10**9,
            bandwidth=8.0e12,
            flops={16: 2.25e15, 8: 4.5e15},
            link_bandwidth=900e9,
            link_latency=_ALL_REDUCE_H100 * 3.0 / 2.3,
            per_machine=8,
            sources=(
                "NVIDIA DGX B200 data sheet, an eighth of the machine: 1,440 GB, 64 TB/s, FP8 72 PFLOPS with "
                "sparsity, NVLink 14.4 TB/s",
                "all-reduce: the H100's times 3.0/2.3, the ratio of the two machines' smallest in NVIDIA/nccl issue "
                "1940",
            ),
        ),
    )
}
