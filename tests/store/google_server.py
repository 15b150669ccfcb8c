"""A server of Google Cloud Storage in memory: `python google_server.py PORT`.

gcp-storage-emulator ignores the condition of a conditional create, so it is added here.
"""

import sys
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

upload = objects._multipart_upload


def conditional_upload(request: Any, response: Any, storage: Any) -> None:
    """Answer 412 if the object must not exist and does; the server handles one request at a time."""
    if request.query.get("ifGenerationMatch") == ["0"]:
        try:
            storage.get_file_obj(request.params["bucket_name"], request.data["meta"]["name"])
        except NotFound:
            pass
        else:
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            return
    upload(request, response, storage)


if __name__ == "__main__":
    objects._multipart_upload = conditional_upload
    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
