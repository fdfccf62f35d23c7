"""Training on several processes: rows spread over data ranks, features over feature ranks, or both."""

from fastsae.distributed.layout import Layout
from fastsae.distributed.ranks import Ranks, launched, start
from fastsae.distributed.sharding import consolidate, new, shard

__all__ = ["Layout", "Ranks", "consolidate", "launched", "new", "shard", "start"]
