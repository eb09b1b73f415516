"""Unsupervised cross-domain image retrieval: UCDIR, ProtoOT and UEM as one experiment pipeline."""

import os
import sys

# Before torch loads OpenMP: idle threads must sleep, not spin. Spinning makes small operations
# 60 times slower on a 2-core machine; this is the only place where threading is set up.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before torch takes its first large block: blocks that are freed after each step go back to the system, and
# where pages are small the faults of the next one cost as much as writing it ten times.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_bytecode() -> None:
    """Let this process and those that it starts store what Python compiles.

    Many images set PYTHONDONTWRITEBYTECODE. A study is many processes, and each of them would compile torch,
    ray and mlflow anew, for ten seconds and more.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


__version__ = "0.1.0"
