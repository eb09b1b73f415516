"""A process that takes a training up computes with as many threads as the one that began it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import pytest
import torch

from tests.trainings import CPU, Keep, assert_equal, weights
from ucir.config.data import PackParams
from ucir.config.load import Params, load_params
from ucir.config.model import EncoderParams
from ucir.data.digits import make_digits
from ucir.data.pack import DomainImages, open_domain
from ucir.data.prepare import write_pack
from ucir.methods.registry import METHODS
from ucir.models.checkpoints import save_encoder
from ucir.models.encoder import new_encoder
from ucir.runs.params import method_params
from ucir.training.epochs import epochs, train
from ucir.training.training import Training

ROOT = Path(__file__).parent.parent.parent
CORES = 4
PICTURES = 130


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[DomainImages, ...]:
    folder = tmp_path_factory.mktemp("sample")
    make_digits(folder / "digits", per_class=14)
    domains = ("handwritten", "printed")
    write_pack(folder / "digits", domains, folder / "pack", PackParams(side=40))
    whole = [open_domain(folder / "pack", domain) for domain in domains]
    return tuple(replace(x, row_N=x.row_N[:PICTURES], size_N2=x.size_N2[:PICTURES]) for x in whole)


def _in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads as torch and faiss have them where nobody has set any."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("ucir.devices.usable_cores", lambda: CORES)
    torch.set_num_threads(CORES)
    faiss.omp_set_num_threads(CORES)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Any:
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


def _training(params: Params, images: tuple[DomainImages, ...], start: Path, name: str) -> Training:
    # the cross-domain phase begins with the second epoch
    fields = METHODS[name].params_type.model_fields
    schedule = {"ramp_start": 0, "ramp_end": 1, "cross_domain_start": 1, "warmup": 0, "matching_epochs": 2}
    changes = {"epochs": 3, **{key: value for key, value in schedule.items() if key in fields}}
    given = method_params(params, name, "digits").model_copy(update=changes)
    block = params.datasets["digits"]
    method = METHODS[name](given, 0)
    return Training((images[0], images[1]), block.view, block.start.encoder, start, method, CPU)


@pytest.mark.xdist_group("threads")  # they share the sample
@pytest.mark.parametrize("name", sorted({kind: name for name, kind in reversed(METHODS.items())}.values()))
def test_a_process_that_resumes_rounds_as_the_one_that_began(
    name: str, sample: tuple[DomainImages, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(ROOT / "params.yaml")
    encoder: EncoderParams = params.datasets["digits"].start.encoder
    save_encoder(new_encoder(encoder, 0), tmp_path / "start.pt")
    given = params, sample, tmp_path / "start.pt", name
    _in_a_fresh_process(monkeypatch)
    whole, reporter = _training(*given), Keep()
    progress = epochs(whole, reporter)
    next(progress), next(progress)
    killed = deepcopy(reporter.state)
    list(progress)
    threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    _in_a_fresh_process(monkeypatch)
    resumed = _training(*given)
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == threads
    train(resumed, Keep(killed))
    assert_equal(weights(whole), weights(resumed))
