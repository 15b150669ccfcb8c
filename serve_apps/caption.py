"""`serve run serve_apps.caption:app model=NAME`: captions for images."""

from bridgework.serving.apps import caption as app

__all__ = ["app"]
