"""`serve run serve_apps.embed:app model=NAME`: embeddings, zero-shot classes and ranking."""

from bridgework.serving.app import embed as app

__all__ = ["app"]
