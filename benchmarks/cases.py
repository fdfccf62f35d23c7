"""What is measured: shapes by name."""

from dataclasses import dataclass


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


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smoke", B=128, D=64, M=2048, K=16, N=8, E=32),
        Shape("bench", B=2048, D=1024, M=65536, K=64, N=32, E=128),
        Shape("laptop", B=1024, D=768, M=32768, K=32, N=16, E=128),
        # For a GPU: that of arXiv 2507.00269, one of today's, and the largest.
        Shape("paper", B=4096, D=3200, M=50000, K=1024, N=512, E=300),
        Shape("modern", B=8192, D=4096, M=131072, K=64, N=32, E=256),
        Shape("million", B=8192, D=2048, M=1048576, K=64, N=32, E=128),
    )
}
