"""Unsupervised cross-domain image retrieval: UCDIR, ProtoOT and UEM as one experiment pipeline."""

import os

# Before torch loads OpenMP: idle threads must sleep, not spin. Spinning makes small operations
# 60 times slower on a 2-core machine; this is the only place where threading is set up.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
