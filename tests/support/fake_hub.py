"""A hub on this machine that refuses, as the real one does, whatever is asked of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import hf_api
from transformers.utils import hub as transformers_hub

ANSWERS: dict[str, tuple[int, dict[str, str]]] = {
    "gated": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}),
    "none": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "hidden": (401, {"X-Error-Message": "Invalid username or password."}),
    "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "bare": (404, {"X-Error-Code": "EntryNotFound"}),
}
"""By the owner in a repository's id: status and headers. Of ``bare`` the repository is there, and no file in it."""


class _Handler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        owner = next(owner for owner in ANSWERS if f"/{owner}/" in self.path)
        is_there = owner == "bare" and self.path.endswith("/auth-check")
        status, headers = (200, {}) if is_there else ANSWERS[owner]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    do_GET = do_HEAD = answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def fake_hub(cache: str) -> Iterator[None]:
    """Within the block the libraries ask this hub, and keep what they find in the folder ``cache``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        patch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr(hf_api.api, "endpoint", address)
        patch.setattr(transformers_hub, "_hf_api", None, raising=False)
        yield
    server.shutdown()
    server.server_close()
