"""From the words that name a model to the folder of its artefact."""

from pathlib import Path

from bridgework.lineage.models import is_folder, split


def artefact_of(model: str, home: Path) -> str:
    """The artefact's folder that the words mean. Raises TrackingError where no such version is registered."""
    if is_folder(model):
        return model
    from bridgework.lineage.store import MLflowReader  # loads MLflow, which a folder does not need

    return MLflowReader(None, home).version(*split(model)).artefact
