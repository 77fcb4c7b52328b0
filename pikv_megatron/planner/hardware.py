"""What a rank runs on, as roofs of the predicted step time."""

from dataclasses import dataclass

RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Hardware:
    """Peak figures of one rank.

    Attributes:
        memory_bandwidth: beta, bytes a second.
        compute: gamma, operations a second of a dense matrix product in 16 bits.
        fabric_bandwidth: bytes a second that a rank sends.
        fabric_latency: seconds of a collective that carries nothing.
        host_bandwidth: bytes a second that come from the host's memory.
    """

    memory_bandwidth: float
    compute: float
    fabric_bandwidth: float
    fabric_latency: float
    host_bandwidth: float

    @classmethod
    def h100(cls, num_ranks: int) -> "Hardware":
        """An H100 SXM, by its data sheet: HBM3 3.35 TB/s, 989 TFLOP/s dense bfloat16, NVLink 900
        GB/s within a node of 8 and PCIe 128 GB/s, half of it each way. More ranks take InfiniBand
        NDR, 400 Gb/s a GPU (DGX H100). A collective's latency stands in no data sheet: 10 and 20
        microseconds are assumed."""
        is_one_node = num_ranks <= RANKS_PER_NODE
        fabric = (450e9, 10e-6) if is_one_node else (50e9, 20e-6)
        return cls(3.35e12, 989e12, *fabric, host_bandwidth=64e9)
