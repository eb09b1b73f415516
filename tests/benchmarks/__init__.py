"""Benchmarks, each a program: `uv run python -m tests.benchmarks[.NAME] --help`."""

from __future__ import annotations

import argparse

REMEDY = "`uv run ucir study` lists the studies; choose one with it, then `uv run dvc repro`"


def argument_parser(text: str | None) -> argparse.ArgumentParser:
    """Of a program whose help begins with its docstring."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
