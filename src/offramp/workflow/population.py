"""The population that samples stand for, and the share of each class in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.calibration.evidence import Evidence
from offramp.decoding import parse_json
from offramp.errors import DataError, InvalidArgumentError


def describe_population(
    evidence: Evidence[Any], class_prior: str | dict[str, float]
) -> dict[str, Any]:
    """Describe what samples stand for, as policy files and bundles keep it."""
    return {
        "class_prior": class_prior,
        "weighted": bool(abs(evidence.weights_N - 1).max() > 1e-9),
        "effective_num_samples": evidence.effective_num_samples,
    }


def evidence_for(
    guarantee: float | str | None, evidence: Evidence[Any], data: Mapping[str, Any]
) -> Evidence[Any]:
    """Evidence to choose by, without its prior where a promise on average can do without."""
    if guarantee == "mean" and not data["weighted"]:
        # Drawn class by class, which conformal risk control does not know: approximately, then.
        return replace(evidence, prior=None)
    return evidence


def read_prior(prior: str, class_names: tuple[str, ...]) -> tuple[float, ...]:
    """Read the share of each class: uniform, or a JSON file of shares by name."""
    if prior == "uniform":
        return (1 / len(class_names),) * len(class_names)
    try:
        shares = parse_json(Path(prior).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            "Expected --prior to be uniform, or a JSON file that gives the share of each class by "
            f"its name. Cannot read {prior!r}: {error}."
        ) from error
    known = isinstance(shares, dict) and set(shares) <= set(class_names)
    if not known or not all(type(share) in (int, float) for share in shares.values()):
        raise InvalidArgumentError(
            f"Expected {prior} to give shares by class name, such as "
            f'{{"{class_names[0]}": 0.2, ...}}; classes that are left out have 0. Names: '
            f"{', '.join(class_names)}."
        )
    return tuple(float(shares.get(name, 0)) for name in class_names)


def name_prior(
    prior: str | None, shares: Sequence[float] | None, class_names: Sequence[str]
) -> str | dict[str, float] | None:
    """Name a prior that was asked for: uniform, or each class with its share; None for none."""
    if prior is None or shares is None:
        return None
    return prior if prior == "uniform" else dict(zip(class_names, shares, strict=True))
