"""From the words `llava@champion` to a folder of weights, and the record that lets an answer be traced back to it."""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from bridgework.lineage import models
from bridgework.lineage.store import MLflowTracker
from bridgework.serving.options import Options
from bridgework.serving.router import Served
from bridgework.training import artefact


def resolve(app: str, model: str, options: Options, home: Path) -> Served:
    """Raises TrackingError for an unknown model, version or alias, WeightsError for a folder without an artefact."""
    if models.is_folder(model):
        name, version, folder = Path(model).resolve().name, "", str(Path(model).resolve())
    else:
        name, which = models.split(model)
        found = MLflowTracker(options.tracking, home, "Default").version(name, which)  # MLflow's own: none is made
        version, folder = found.version, found.artefact
    info = artefact.describe(folder)
    pixels = artefact.recipe(folder)[info.stage].model.pixels
    # By content: the same app over the same weights is the same deployment, however often Serve builds it anew.
    words = "\n".join((app, name, version, folder, info.digest))
    deployment = hashlib.sha256(words.encode()).hexdigest()[:12]
    return Served(deployment, app, name, version, folder, info.digest, tiled=bool(pixels.grids))


def record(served: Served, home: Path) -> Path:
    """home/deployments/ID.json, whole or not at all; the time of the first start stays."""
    file = home / "deployments" / f"{served.id}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        temporary = file.with_name(f".{served.id}.{uuid4().hex[:8]}")
        identity = {name: value for name, value in asdict(served).items() if name != "tiled"}
        temporary.write_text(json.dumps(identity | {"started": started}, indent=1))
        temporary.rename(file)
    return file
