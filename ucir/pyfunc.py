"""A model in MLflow's `pyfunc` flavour: registered in its registry, served by ``mlflow models serve``.

Its input is a table with a column ``image`` of files' bytes (base64 in JSON), its output their unit features.
The folder holds the model's file and this package, and needs neither params.yaml nor an installed `ucir`.
"""

from __future__ import annotations

import io
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ucir
from ucir.data.decode import decode_image
from ucir.errors import UserError
from ucir.models.model import BATCH, Model, Stored, load_model, save_model, stored_picture

COLUMN = "image"
REQUIREMENTS = (
    *("torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "pydantic", "requests", "rich"),
    "mlflow",
)
"""What loading and using a model imports."""


class PictureFeatures:
    """What MLflow calls."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, table: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """Unit features, (B, D) float32.

        Args:
            table: a data frame with the column ``image``: bytes of a picture's file.
            params: ``domain``: of the pictures, one of the model's; empty: of each the nearest.

        Raises:
            UserError: no picture; a domain that the model does not know.
        """
        domain = (params or {}).get("domain") or None
        self.model.check_domain(domain)
        stored = [self._stored(data) for data in table[COLUMN]]
        parts = [self.model.embed(stored[i : i + BATCH], domain) for i in range(0, len(stored), BATCH)]
        return torch.cat(parts).numpy()

    def _stored(self, data: bytes) -> Stored:
        try:
            return stored_picture(decode_image(data, self.model.pack.max_pixels), self.model.pack)
        except ValueError as error:
            raise UserError(f"column {COLUMN!r}: {error}") from None


def _load_pyfunc(data_path: str) -> PictureFeatures:
    """MLflow's entry: of the file that :func:`save_pyfunc` put there."""
    return PictureFeatures(load_model(data_path))


def save_pyfunc(model: Model, folder: Path, model_id: str | None = None, run_id: str | None = None) -> None:
    """Write the flavour's folder: model, this package, requirements, signature and an example.

    Args:
        model: it.
        folder: that does not exist yet.
        model_id, run_id: of MLflow's store.
    """
    import mlflow
    import pandas
    from mlflow.models import Model as Flavours
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    picture = io.BytesIO()
    Image.linear_gradient("L").save(picture, "png")
    signature = ModelSignature(
        Schema([ColSpec("binary", COLUMN)]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, model.dim))]),
        ParamSchema([ParamSpec("domain", "string", "")]),
    )
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "model.pt"
        save_model(model.whole(), file)
        mlflow.pyfunc.save_model(
            folder,
            loader_module=__name__,
            data_path=file,
            code_paths=[str(Path(ucir.__file__).parent)],
            mlflow_model=Flavours(model_id=model_id, run_id=run_id),
            pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
            signature=signature,
            input_example=pandas.DataFrame({COLUMN: [picture.getvalue()]}),
            metadata={key: str(value) for key, value in model.facts.items()},
        )
