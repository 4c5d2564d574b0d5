"""Names on the hub, tested against a small server on this machine that speaks its endpoints."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import errors

import formats
from conftest import ROOT, TINY, Failing, refused
from convert_weights import UserError, load_dit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "transformer/diffusion_pytorch_model-00003-of-00005.safetensors"
NOT_NEEDED = ["assets/picture.bin", "vae/diffusion_pytorch_model.fp16.safetensors",
              "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
              "text_encoder/model.fp16.safetensors", "text_encoder/model.non_ema.safetensors"]


class Hub(BaseHTTPRequestHandler):
    """The tiny checkpoint as the model "tiny/model"."""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET(with_body=False)

    def do_GET(self, with_body=True):
        path = self.path.split("?")[0]
        self.server.requests.append((path, self.headers.get("Range")))
        if not re.match(r"(/api/models)?/tiny/model(/|$)", path):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif path.startswith("/api/models/tiny/model/tree/"):
            self.answer(200, json.dumps(self.files()).encode(), {}, with_body)
        elif path.startswith("/api/models/"):
            names = [{"rfilename": entry["path"]} for entry in self.files()]
            info = {"id": "tiny/model", "modelId": "tiny/model", "sha": COMMIT, "siblings": names}
            self.answer(200, json.dumps(info).encode(), {}, with_body)
        else:
            self.send_a_file(path.removeprefix(f"/tiny/model/resolve/{COMMIT}/"), with_body)

    def files(self):
        found = [{"type": "file", "path": path.relative_to(TINY).as_posix(), "oid": "a" * 40,
                  "size": path.stat().st_size} for path in TINY.rglob("*") if path.is_file()]
        more = {"type": "file", "oid": "a" * 40, "size": 10 ** 12}
        return [*found, *({**more, "path": path} for path in NOT_NEEDED)]

    def send_a_file(self, name, with_body):
        data = (TINY / name).read_bytes()
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = 0
        if self.headers.get("Range"):
            start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        end = len(data)
        if with_body and name == SHARD and self.server.failures:
            self.server.failures -= 1
            end = start + 20_000                  # then the line is cut
        self.answer(206 if start else 200, data[start:], headers, with_body, end - start)

    def answer(self, status, body, headers, with_body, sent=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if with_body:
            self.wfile.write(body[:sent])
        if sent is not None and sent < len(body):
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.failures = [], 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def convert(hub, folder, name="tiny/model", **environment):
    """convert_weights.py NAME folder/out in a process of its own, with a cache of its own."""
    port = hub.server_address[1]
    environment = {
        **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    return subprocess.run(
        [sys.executable, ROOT / "convert_weights.py", name, "out"], cwd=folder, text=True,
        env=environment, capture_output=True, timeout=120)


@pytest.mark.slow
def test_a_model_is_fetched_once_and_whole(hub, tmp_path):
    result = convert(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/dit.safetensors").exists()
    paths = [path for path, _ in hub.requests]
    assert not any(path.endswith(tuple(NOT_NEEDED)) for path in paths)
    assert any(path.endswith(SHARD) for path in paths)

    (tmp_path / "out").rename(tmp_path / "first")
    hub.requests.clear()
    assert convert(hub, tmp_path, HF_HUB_OFFLINE="1").returncode == 0
    assert hub.requests == []                     # all of it is in the cache


@pytest.mark.slow
def test_an_interrupted_download_goes_on(hub, tmp_path):
    hub.failures = 1
    result = convert(hub, tmp_path)
    if result.returncode:                         # older versions of the library give up at once
        assert refused(result, "tiny/model", "call again")
        result = convert(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert hub.failures == 0                      # the line was cut
    times = [path for path, _ in hub.requests if path.endswith("model_index.json")]
    shards = [path for path, _ in hub.requests if path.endswith(SHARD)]
    assert len(shards) > len(times)               # of the shard alone more was asked for
    assert load_dit(tmp_path / "out").state_dict().keys() == load_dit(
        TINY / "transformer").state_dict().keys()


@pytest.mark.slow
def test_models_that_cannot_be_had(hub, tmp_path):
    assert refused(convert(hub, tmp_path, "nobody/nothing"), "nobody/nothing", "no such model")
    assert refused(convert(hub, tmp_path, HF_HUB_OFFLINE="1"), "tiny/model", "cannot be reached")
    hub.shutdown()
    hub.server_close()
    assert refused(convert(hub, tmp_path), "tiny/model", "cannot be reached")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("listed, files", [
    (["vae/b.fp16.safetensors", "vae/b.safetensors", "vae/c.txt"], ["vae/b.safetensors"]),
    (["vae/b.fp16.safetensors", "vae/b.non_ema.safetensors"], ["vae/b.fp16.safetensors"]),
    (["vae/b-00001-of-00002.safetensors", "vae/b-00002-of-00002.safetensors"],
     ["vae/b-00001-of-00002.safetensors", "vae/b-00002-of-00002.safetensors"]),
    (["vae.safetensors", "dit.safetensors", "other.safetensors"], ["vae.safetensors"]),
    ([], [])])
def test_of_variants_one_is_fetched(tmp_path, listed, files):
    named = {"dit": "x", "text_encoder": "x"}
    assert formats.wanted_weights(tmp_path, listed, named) == files


def hub_error(name):
    """An error of the library's, as it is raised for an answer of the hub."""
    error = getattr(errors, name)
    return error.__new__(error)


@pytest.mark.parametrize("error, words, not_said", [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left", "interrupted"),
    (OSError(errno.EFBIG, "File too large"), "File too large", "interrupted"),
    (ConnectionError("reset"), "interrupted.*call again", "written"),
    (hub_error("GatedRepoError"), "terms.*hf auth login", "no such"),
    (hub_error("RepositoryNotFoundError"), "no such model", "terms")])
def test_why_a_download_fails(monkeypatch, error, words, not_said):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Failing(error))
    with pytest.raises(UserError, match=f"a/b: .*{words}") as caught:
        formats.find_parts("a/b", {})
    assert not_said not in str(caught.value)
