"""The stages of dvc.yaml, each a process of its own: `python -m pipeline.<stage> <item>`."""

from ucir import keep_bytecode

keep_bytecode()
