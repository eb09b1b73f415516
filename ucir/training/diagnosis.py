"""What is said of a training whose numbers are no longer finite."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ucir.memory import Features


class NotFiniteError(FloatingPointError):
    """A loss became infinite or NaN. Nothing is patched: ``details`` describe the step's inputs instead."""

    def __init__(self, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)  # alone, so that Ray can carry the error from a worker
        self.details = details or {}


def loss_fault(
    epoch: int,
    step: int,
    terms: dict[str, float],
    inputs: dict[str, Tensor],
    slots: tuple[Tensor, ...],
    network: nn.Module,
) -> NotFiniteError:
    """For a step whose loss is not finite."""
    values = ", ".join(f"{name} = {value:g}" for name, value in terms.items())
    details = {
        "epoch": epoch,
        "step": step,
        "terms": terms,
        "inputs": {name: statistics(value) for name, value in inputs.items()},
        "slots": [slot.tolist() for slot in slots],
        "weights": weights(network),
    }
    remedy = "a smaller lr or a higher temperature may help"
    return NotFiniteError(f"epoch {epoch}, step {step}: a loss is not finite: {values}; {remedy}", details)


def feature_fault(epoch: int, features: tuple[Features, ...], network: nn.Module) -> NotFiniteError:
    """For an epoch whose last step spoilt the weights without a loss to show it."""
    sides = (chr(ord("a") + number) for number in range(len(features)))
    inputs = {f"features_{side}": statistics(x.own_ND) for side, x in zip(sides, features, strict=True)}
    details = {"epoch": epoch, "inputs": inputs, "weights": weights(network)}
    return NotFiniteError(f"epoch {epoch}: weights or features are not finite after its last step", details)


def weights(network: nn.Module) -> dict[str, dict[str, float]]:
    """Statistics of every parameter."""
    return {name: statistics(value) for name, value in network.named_parameters()}


def statistics(x: Tensor) -> dict[str, float]:
    """Of the finite values, and how many are not."""
    finite = x.detach()[x.detach().isfinite()].float()
    values = {"not_finite": float(x.numel() - finite.numel())}
    if len(finite):
        values |= {"min": float(finite.min()), "max": float(finite.max()), "mean": float(finite.mean())}
    return values
