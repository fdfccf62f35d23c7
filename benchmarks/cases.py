"""Shapes that are measured, by name, and the least work of a training step, by formula."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """B rows, D = d_in, M = d_sae, K = k, N = k_integration, E = d_embedding."""

    name: str
    B: int
    D: int
    M: int
    K: int
    N: int
    E: int

    def scaled(self, axis: str, size: int) -> "Shape":
        """Copy this shape with another size of one axis; N stays half of K."""
        changed = replace(self, name=f"{axis}={size}", **{axis: size})
        return replace(changed, N=max(1, size // 2)) if axis == "K" else changed

    def parameters(self, joint: bool) -> int:
        """Numbers trained. TopKSAE has W_enc, W_dec, b_enc, b_dec; JointSAE has no b_dec, and its integration."""
        D, M, E = self.D, self.M, self.E
        if not joint:
            return 2 * M * D + M + D
        return 3 * M * D + M + D + M * E + E * E + E + D * E + D


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smoke", B=128, D=64, M=2048, K=16, N=8, E=32),
        Shape("laptop", B=1024, D=768, M=32768, K=32, N=16, E=128),
        Shape("bench", B=2048, D=1024, M=65536, K=64, N=32, E=128),
        # For a GPU: that of arXiv 2507.00269, one of today's, and the largest.
        Shape("paper", B=4096, D=3200, M=50000, K=1024, N=512, E=300),
        Shape("modern", B=8192, D=4096, M=131072, K=64, N=32, E=256),
        Shape("million", B=8192, D=2048, M=1048576, K=64, N=32, E=128),
        # Their relatives for a CPU: the same proportions of M to D, and in the paper's of K to M.
        Shape("paper-small", B=512, D=800, M=12500, K=256, N=128, E=75),
        Shape("modern-small", B=512, D=512, M=16384, K=64, N=32, E=32),
        Shape("million-small", B=512, D=256, M=131072, K=64, N=32, E=32),
    )
}


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that must be read or written once."""

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The time of whichever takes longer: a bound from below, the other being hidden behind it."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


PHASES = ("encode", "decode", "backward", "optimizer")


def work(shape: Shape, joint: bool) -> dict[str, Work]:
    """The work of each phase of a training step in fp32, a batch being random.

    Pre-activations count as operations and not as bytes: nothing says that they must leave the cache. A dictionary's
    rows that no token uses are not read in decoding. Their gradients of zero are written, since Adam reads them.
    """
    B, D, M, K, E = shape.B, shape.D, shape.M, shape.K, shape.E
    N = shape.N if joint else 0
    width = (D + E) if joint else 0  # of a feature's rows in W_lin and V
    network = (E * E + D * E) if joint else 0
    code = B * K * (4 + 8)
    rows = 4 * (_used(M, B, K) * D + _used(M, B, N) * width + network)
    gathers = 2 * B * (K * D + N * (D + 2 * E)) + 2 * B * network
    gradients = 4 * (2 * M * D + M * width + network)
    numbers = shape.parameters(joint)
    return {
        "encode": Work(2 * B * M * D, 4 * (B * D + M * D + M) + code),
        "decode": Work(gathers, rows + code + 4 * B * D),
        # Twice the forward's products: one for the code, one for the weights; and the encoder's weights.
        "backward": Work(2 * gathers + 2 * B * K * D, rows + code + 4 * 2 * B * D + gradients),
        # The gradient is read; the weight and two moments are read and written.
        "optimizer": Work(12 * numbers, 7 * 4 * numbers),
    }


def _used(M: int, B: int, K: int) -> float:
    """Features that are active anywhere in a batch, where each token takes K of M at random; real ones take fewer."""
    return M * (1 - (1 - K / M) ** B)


def floor_seconds(shape: Shape, joint: bool, flops_per_second: float, bytes_per_second: float) -> float:
    """Compute the least time of a step, one phase after another, at the rates of the roofs."""
    return sum(w.seconds(flops_per_second, bytes_per_second) for w in work(shape, joint).values())
