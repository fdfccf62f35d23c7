"""Imports of the server that forks the victims: them, and what torch imports at a first step of training only."""

import torch
import victims

torch.set_num_threads(1)
x = torch.randn(8, victims.D)
victims.trainer(None, resume=False, steps=1, warmup_steps=0, decay_steps=0, k_anneal_from=None).fit([x])
