"""Unsupervised cross-domain image retrieval: UCDIR, ProtoOT and UEM as one experiment pipeline."""

import os

# Before torch loads OpenMP: idle threads must sleep, not spin. Spinning makes small operations
# 60 times slower on a 2-core machine; this is the only place where threading is set up.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before torch takes its first large block: blocks that are freed after each step go back to the system, and
# where pages are small the faults of the next one cost as much as writing it ten times.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
