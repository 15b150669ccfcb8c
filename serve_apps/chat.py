"""`serve run serve_apps.chat:app model=NAME`: OpenAI-compatible chat; a page to try it at /."""

from bridgework.serving.app import chat as app

__all__ = ["app"]
