"""From the words `llava@champion` to a folder of weights, and the record that lets an answer be traced back to it."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from bridgework.lineage import models
from bridgework.lineage.store import MLflowTracker
from bridgework.serving.options import Options
from bridgework.training import artefact


@dataclass(frozen=True)
class Served:
    """One model of an app: `id` is the deployment's, and stands in the id of every answer."""

    id: str
    app: str
    model: str  # as clients name it
    version: str  # "" for a plain folder
    artefact: str
    digest: str

    @property
    def pinned(self) -> str:
        """The name that always means this model, whatever the challenger's share."""
        return f"{self.model}:{self.version}" if self.version else self.model


def resolve(app: str, model: str, options: Options, home: Path) -> Served:
    """Raises TrackingError for an unknown model, version or alias, WeightsError for a folder without an artefact."""
    if models.is_folder(model):
        name, version, folder = Path(model).resolve().name, "", str(Path(model).resolve())
    else:
        name, which = models.split(model)
        found = MLflowTracker(options.tracking, home, app).version(name, which)
        version, folder = found.version, found.artefact
    digest = artefact.describe(folder).digest
    # By content: the same app over the same weights is the same deployment, however often Serve builds it anew.
    words = "\n".join((app, name, version, folder, digest))
    return Served(hashlib.sha256(words.encode()).hexdigest()[:12], app, name, version, folder, digest)


def record(served: Served, home: Path) -> Path:
    """home/deployments/ID.json, whole or not at all; the time of the first start stays."""
    file = home / "deployments" / f"{served.id}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{served.id}.{uuid4().hex[:8]}")
        temporary.write_text(json.dumps(asdict(served) | {"started": time.time()}, indent=1))
        temporary.rename(file)
    return file

