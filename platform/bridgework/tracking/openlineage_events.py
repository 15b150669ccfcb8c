"""OpenLineage events of imports, curations, stages, trials, evaluations, promotions, deployments.

Other catalogues read them (https://openlineage.io, event version 2). They are appended to
<home>/openlineage.jsonl. The client's own settings (OPENLINEAGE_URL, OPENLINEAGE__TRANSPORT__TYPE,
openlineage.yml, OPENLINEAGE_DISABLED) send them elsewhere, e.g. to Marquez by HTTP.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from uuid import UUID, uuid4, uuid5

from bridgework import __version__
from bridgework.data.manifest import Manifest
from bridgework.tracking import environment

NAMESPACE = "bridgework"  # of jobs
FILE = "openlineage.jsonl"
PRODUCER = f"urn:bridgework:{__version__}"
OWN = UUID("0b1d6e0c-6a43-5a6c-9a5e-6f1d7a3c2b90")  # namespace of derived run ids

State = Literal["START", "COMPLETE", "FAIL", "ABORT", "OTHER"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """Dataset, weights or model version, as input or output of a job.

    location: folder, URL, or e.g. "models:/llava/2". version: its digest.
    """

    location: str
    version: str = ""
    rows: int | None = None
    size: int | None = None  # bytes


@dataclass(frozen=True)
class Event:
    """One change of state of one job run.

    kind: e.g. "STAGE". job: e.g. "llava/align". run: an MLflow run id, or any text that identifies
    the run; empty for a new one. parent: (job, run) of the job that started it.
    """

    kind: str
    job: str
    state: State
    run: str = ""
    inputs: Sequence[Artifact] = ()
    outputs: Sequence[Artifact] = ()
    parent: tuple[str, str] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


def emit(home: Path, event: Event) -> None:
    """Send an event. A failure is a warning, and never stops the caller."""
    try:
        _client(str(home)).emit(_run_event(event))
    except Exception as error:  # of any transport
        log.warning("OpenLineage: an event of %s was not sent: %s", event.job, error)


def dataset_written(
    home: Path, kind: str, sources: Sequence[str], dest: str, manifest: Manifest
) -> None:
    """Send the event of an import or a curation that has written `dest`."""
    parents = (*manifest.parents, *[""] * len(sources))
    inputs = [Artifact(source, parent) for source, parent in zip(sources, parents, strict=False)]
    size = sum(shard.bytes for shard in manifest.shards)
    emit(
        home,
        Event(
            kind,
            f"{kind.lower()}/{manifest.made_by}/{Path(dest).name}",
            "COMPLETE",
            run=manifest.digest,
            inputs=inputs,
            outputs=[Artifact(dest, manifest.digest, manifest.rows, size)],
            tags={"license": manifest.license, "source": manifest.source},
        ),
    )


def _run_event(event: Event) -> Any:
    from openlineage.client.event_v2 import Job, Run, RunEvent, RunState
    from openlineage.client.generated import (
        error_message_run,
        job_type_job,
        parent_run,
        processing_engine_run,
        tags_run,
    )

    facets: dict[str, Any] = {
        "processing_engine": processing_engine_run.ProcessingEngineRunFacet(
            version=environment.versions(), name="bridgework"
        )
    }
    tags = {**environment.tags(), **event.tags}
    facets["tags"] = tags_run.TagsRunFacet(
        tags=[
            tags_run.TagsRunFacetFields(key=key, value=value, source="BRIDGEWORK")
            for key, value in tags.items()
            if value
        ]
    )
    if event.parent is not None:
        job, run = event.parent
        facets["parent"] = parent_run.ParentRunFacet(
            run=parent_run.Run(runId=run_id(run)),
            job=parent_run.Job(namespace=NAMESPACE, name=job),
        )
    if event.error:
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(
            message=event.error, programmingLanguage="PYTHON"
        )
    kind = job_type_job.JobTypeJobFacet(
        processingType="SERVICE" if event.kind == "DEPLOYMENT" else "BATCH",
        integration="BRIDGEWORK",
        jobType=event.kind,
    )
    return RunEvent(
        eventTime=datetime.now(UTC).isoformat(),
        eventType=RunState[event.state],
        run=Run(runId=run_id(event.run), facets=facets),
        job=Job(namespace=NAMESPACE, name=event.job, facets={"jobType": kind}),
        inputs=[_dataset(one, output=False) for one in event.inputs],
        outputs=[_dataset(one, output=True) for one in event.outputs],
        producer=PRODUCER,
    )


def run_id(text: str) -> str:
    """Return the UUID of a run: MLflow's own id as one, or one derived from any other text."""
    if not text:
        return str(uuid4())
    try:
        return str(UUID(text))
    except ValueError:
        return str(uuid5(OWN, text))


def _dataset(artifact: Artifact, *, output: bool) -> Any:
    """Return the dataset by OpenLineage's naming: (file, path), (s3://bucket, key), .."""
    from openlineage.client.event_v2 import InputDataset, OutputDataset
    from openlineage.client.generated.dataset_version_dataset import DatasetVersionDatasetFacet
    from openlineage.client.generated.output_statistics_output_dataset import (
        OutputStatisticsOutputDatasetFacet,
    )

    parts = urlsplit(artifact.location)
    if artifact.location.startswith("models:/"):
        namespace, name = "mlflow", artifact.location
    elif parts.scheme and parts.netloc:
        namespace, name = f"{parts.scheme}://{parts.netloc}", parts.path.lstrip("/")
    elif parts.scheme:  # e.g. synthetic:shapes
        namespace, name = NAMESPACE, artifact.location
    else:
        namespace, name = "file", str(Path(artifact.location).absolute())
    version = artifact.version
    facets = {"version": DatasetVersionDatasetFacet(datasetVersion=version)} if version else {}
    if not output:
        return InputDataset(namespace=namespace, name=name or "/", facets=dict(facets))
    counts = {}
    if artifact.rows is not None:
        counts["outputStatistics"] = OutputStatisticsOutputDatasetFacet(
            rowCount=artifact.rows, size=artifact.size
        )
    return OutputDataset(
        namespace=namespace, name=name or "/", facets=dict(facets), outputFacets=dict(counts)
    )


@cache
def _client(home: str) -> Any:
    """Return the client of this process: by its own settings, else with a file under `home`."""
    from openlineage.client import OpenLineageClient
    from openlineage.client.transport.file import FileConfig, FileTransport
    from openlineage.client.transport.noop import NoopConfig, NoopTransport

    settings = OpenLineageClient(transport=NoopTransport(NoopConfig())).config.transport
    if settings or os.environ.get("OPENLINEAGE_URL") or os.environ.get("OPENLINEAGE_DISABLED"):
        return OpenLineageClient()
    Path(home).mkdir(parents=True, exist_ok=True)
    file = FileConfig(log_file_path=str(Path(home) / FILE), append=True)
    return OpenLineageClient(transport=FileTransport(file))
