"""What is measured: shapes by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """B rows, D = d_in, M = d_sae, K = k, N = k_integration, E = d_embedding; fp32."""

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
    )
}
