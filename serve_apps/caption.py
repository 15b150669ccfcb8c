"""`serve run serve_apps.caption:app model=NAME`: captions of images."""

from bridgework.serving.app import caption as app

__all__ = ["app"]
