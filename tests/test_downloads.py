"""Test downloads from a real server on this machine: fetched once, verified, unpacked inside their folder."""

import gzip
import hashlib
import io
import socket
import tarfile

import pytest
from conftest import SAMPLE, TINY, error_line, script

import pretrained
from cli import InputError
from downloads import download
from pretrained import published_or_persona, resolve_checkpoint


def test_a_file_is_fetched_once(server):
    server.files["/data.json"] = (b"[1]", {})
    first = download(f"{server.address}/data.json")
    assert first.read_bytes() == b"[1]" and first.name.endswith("data.json")
    asked = list(server.asked)
    assert download(f"{server.address}/data.json") == first
    assert server.asked == asked


def test_equal_file_names_do_not_mix(server):
    server.files |= {"/a/data.json": (b"a", {}), "/b/data.json": (b"b", {})}
    assert download(f"{server.address}/a/data.json").read_bytes() == b"a"
    assert download(f"{server.address}/b/data.json").read_bytes() == b"b"


def test_the_checksum_in_the_address_is_verified(server):
    body = b"something"
    server.files["/x"] = (body, {})
    right = hashlib.sha256(body).hexdigest()
    assert download(f"{server.address}/x#sha256={right}").read_bytes() == body
    server.files["/y"] = (body, {})
    with pytest.raises(InputError, match="hash"):
        download(f"{server.address}/y#sha256={'0' * 64}")


def test_the_checksum_of_s3_is_verified(server):
    body, s3 = b"something", {"Server": "AmazonS3"}
    server.files["/right"] = (body, s3 | {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
    server.files["/wrong"] = (body, s3 | {"ETag": f'"{"0" * 32}"'})
    assert download(f"{server.address}/right").read_bytes() == body
    with pytest.raises(InputError, match="hash"):
        download(f"{server.address}/wrong")


def test_a_download_cut_short_is_refused_and_not_kept(server):
    server.files["/cut"] = (b"half", {"Content-Length": 8})
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be downloaded"):
            download(f"{server.address}/cut")


def test_unreachable_addresses_are_named(server, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/data.json"
    for address in (nobody, f"{server.address}/missing.json"):
        line = error_line("train.py", "--model_checkpoint", TINY, "--dataset_path", address, cwd=tmp_path)
        assert address in line and "cannot be downloaded" in line and "--dataset_path" in line
        line = error_line("interact.py", "--model_checkpoint", address, "--personality", "", cwd=tmp_path)
        assert address in line and "--model_checkpoint" in line


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_data_and_a_model_from_addresses(server, trained, tmp_path):
    server.files["/data.json.gz"] = (gzip.compress(SAMPLE.read_bytes()), {})
    server.files["/model.tar.gz"] = (archive(**{
        f"some/folder/{file.name}": file.read_bytes() for file in trained.iterdir() if file.is_file()}), {})
    out = script("convai_evaluation.py", "--dataset_path", f"{server.address}/data.json.gz",
                 "--model_checkpoint", f"{server.address}/model.tar.gz", cwd=tmp_path)
    assert "FINAL Hits@1: 0." in out
    assert "B/s" in script.stderr  # the progress bar


def test_an_archive_without_a_model_is_refused(server):
    server.files["/empty.tar.gz"] = (archive(readme=b"no model"), {})
    with pytest.raises(InputError, match="contains no config.json"):
        resolve_checkpoint(f"{server.address}/empty.tar.gz")


def test_chats_prefer_the_published_model(server, monkeypatch):
    monkeypatch.setattr(pretrained, "HF_FINETUNED_MODEL", f"{server.address}/model.tar.gz")
    server.files["/model.tar.gz"] = b"an archive", {}
    assert published_or_persona("") == ""
    assert published_or_persona("gpt2") == "gpt2"
    download(f"{server.address}/model.tar.gz")
    server.files.clear()
    assert published_or_persona("") == ""  # from the earlier download


@pytest.mark.parametrize("fault", ["refused", "silent", "missing"])
def test_chats_fall_back_to_persona(
        server, monkeypatch, caplog, fault):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        if fault == "refused":
            silent.close()
        port = silent.getsockname()[1] if fault == "silent" else 9
        host = server.address if fault == "missing" else f"http://127.0.0.1:{port}"
        monkeypatch.setattr(pretrained, "HF_FINETUNED_MODEL", f"{host}/model.tar.gz")
        assert published_or_persona("") == "persona"
    assert len(caplog.records) == 1 and "cannot be reached" in caplog.text


def test_evaluation_does_not_fall_back(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFERTRANSFO_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "HF_FINETUNED_MODEL", "http://127.0.0.1:9/model.tar.gz")
    with pytest.raises(InputError, match="cannot be downloaded .* --model_checkpoint persona"):
        resolve_checkpoint("")
