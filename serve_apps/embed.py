"""`serve run serve_apps.embed:app model=NAME`: embeddings of texts and images, zero-shot classes, ranking."""

from bridgework.serving.app import embed as app

__all__ = ["app"]
