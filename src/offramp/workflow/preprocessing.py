"""Finding how samples become the inputs of a bundle: from itself, its recipe, or its shapes.

No torch: ``predict`` needs none for a bundle that says it.
"""

from __future__ import annotations

from offramp.errors import ArtifactError
from offramp.runtime import Bundle
from offramp.runtime.preprocessing import AnyPreprocessing, Preprocessing


def preprocessing_of(bundle: Bundle) -> tuple[AnyPreprocessing, str | None]:
    """Say how samples become inputs, and in a note what had to be taken for granted."""
    known = bundle.preprocessing
    if known is not None:
        return known, None
    if bundle.recipe is not None:  # exported before bundles said it; takes torch
        from offramp.workflow.recipe_samples import recipe_of

        return recipe_of(bundle).preprocessing(), None
    shape, *others = [spec.sample_shape for spec in bundle.inputs]
    is_float = bundle.inputs[0].dtype.startswith("float")
    if others or not is_float or len(shape) != 3 or shape[0] not in (1, 3) or None in shape:
        shown = ", ".join(f"{spec.dtype} {spec.sample_shape}" for spec in bundle.inputs)
        raise ArtifactError(
            f"The bundle {bundle.folder} does not say how samples become its inputs, {shown}. "
            "Export it with preprocessing=Preprocessing(...) or TextPreprocessing(...), or use "
            "Session(...).run() from Python."
        )
    channels, height, width = (size or 1 for size in shape)
    note = (
        f"note: {bundle.folder} does not say how pictures become its inputs. They are stretched to "
        f"{height}x{width}, and pixels go from 0 to 1; if it was trained otherwise, export it with "
        "preprocessing=Preprocessing(...)"
    )
    return Preprocessing(height=height, width=width, channels=1 if channels == 1 else 3), note
