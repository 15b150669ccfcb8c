"""`serve run serve_apps.caption:app model=NAME`: captions for images."""

from bridgework.serving.caption import app

__all__ = ["app"]
