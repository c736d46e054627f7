"""Upload of an artifact, against a server of the test's own on the loopback address."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hyperion_core.artifact import Artifact
from hyperion_core.errors import ArtifactError

from hyperion.deployment.hub import push


class Hub(ThreadingHTTPServer):
    """As much of the Hub as an upload asks for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.refuses = False


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses:
            return self.answer({"error": "You don't have the rights to create a model"}, 403)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/tuned"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": "http://127.0.0.1/me/tuned/commit/1", "commitOid": "1", "success": True})
        return self.answer({}, 404)

    def do_GET(self) -> None:
        self.answer({"id": "me/tuned", "sha": "0", "siblings": [], "name": "me", "type": "user"})

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Stay silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\n---\n# card")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5/optimizer.pt").write_bytes(b"big")
    (tmp_path / ".checkpoint-6.partial").mkdir()
    (tmp_path / ".checkpoint-6.partial/half").write_bytes(b"half")
    return Artifact(tmp_path, {"type": "lora"})


def test_the_artifact_is_uploaded_without_its_checkpoints(hub: Hub, artifact: Artifact) -> None:
    url = push(artifact, "me/tuned", private=True, log=lambda text: None)
    assert hub.created[0]["name"] == "tuned"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert sorted(hub.files) == ["README.md", "adapter_config.json"]
    assert hub.files["README.md"].endswith(b"# card")
    assert url.endswith("/me/tuned")


def test_a_refusal_says_how_to_upload_later_and_loses_nothing(hub: Hub, artifact: Artifact) -> None:
    hub.refuses = True
    with pytest.raises(ArtifactError, match="could not be uploaded to me/tuned") as caught:
        push(artifact, "me/tuned", private=None, log=lambda text: None)
    assert "hf upload me/tuned" in caught.value.fix
    assert (artifact.folder / "adapter_config.json").exists()
