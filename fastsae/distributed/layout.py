"""Division of the work among ranks: data ranks each train on their rows, feature ranks each hold their features."""

from dataclasses import dataclass

# One row per feature: what feature ranks split. Every other tensor is whole on every rank.
BY_FEATURE = ("W_enc", "b_enc", "W_dec", "W_lin", "V", "rows_since_fired")


@dataclass(frozen=True)
class Layout:
    """data x features ranks. Those of one batch share, feature rank by feature rank, are neighbours: on one machine."""

    data: int = 1
    """Groups of ranks that train on different rows, each with a whole SAE."""
    features: int = 1
    """Ranks of a group, each with an equal part of the features."""

    def __post_init__(self) -> None:
        if self.data < 1 or self.features < 1:
            raise ValueError(f"Layout: expected at least 1 data and 1 feature rank; got {self.data}, {self.features}")

    @property
    def ranks(self) -> int:
        return self.data * self.features

    def features_each(self, d_sae: int) -> int:
        """Features of each rank. Raises ValueError where they cannot be split evenly."""
        if d_sae % self.features:
            near = max(self.features, d_sae // self.features * self.features)
            raise ValueError(
                f"Layout: d_sae = {d_sae} cannot be split evenly over {self.features} feature ranks; near ones that "
                f"can: {near} and {near + self.features}"
            )
        return d_sae // self.features
