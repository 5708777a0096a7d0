"""Downloads from servers on this machine that do everything a server can do wrong."""

import hashlib
import io
import os
import socketserver
import tarfile
import threading
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from conftest import run_inside
from test_data import write_cifar, write_mnist
from tqdm import tqdm

from common import UserError, data, downloads

CONTENT = np.random.default_rng(0).integers(0, 256, 150_000, dtype=np.uint8).tobytes()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(socketserver.ThreadingTCPServer):
    """Mirrors on localhost: `mirrors[path]` answers a request for it; `asked` holds (path, Range) of each request."""

    allow_reuse_address = daemon_threads = True
    block_on_close = False

    def __init__(self):
        self.mirrors, self.asked, self.closing = {}, [], threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, mirror):
        path = f"/{len(self.mirrors)}-{mirror.__name__}"
        self.mirrors[path] = mirror
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request, client_address):
        pass  # a client that hung up


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        self.server.mirrors[self.path](self)

    def log_message(self, *arguments):
        pass

    def head(self, status, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    @property
    def start(self):
        asked = self.headers.get("Range")
        return int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def good(handler, content=CONTENT, send=None):
    """Answers ranges; sends only `send` bytes of what it announced, if given."""
    if handler.start >= len(content):
        return handler.head(416, Content_Range=f"bytes */{len(content)}")
    rest = content[handler.start :]
    if handler.start:
        span = f"bytes {handler.start}-{len(content) - 1}/{len(content)}"
        handler.head(206, Content_Length=len(rest), Content_Range=span)
    else:
        handler.head(200, Content_Length=len(rest))
    handler.wfile.write(rest[:send])


def without_ranges(handler):
    handler.head(200, Content_Length=len(CONTENT))
    handler.wfile.write(CONTENT)


def without_length(handler):
    handler.head(200)
    handler.wfile.write(CONTENT)


def closes_early(handler):
    good(handler, send=40_000)


def closes_early_without_ranges(handler):
    handler.head(200, Content_Length=len(CONTENT))
    handler.wfile.write(CONTENT[:60_000])


def breaks_a_chunk(handler):
    handler.head(200, Transfer_Encoding="chunked")
    handler.wfile.write(b"8000\r\n" + CONTENT[:0x4000])


def nonsense_chunk(handler):
    handler.head(200, Transfer_Encoding="chunked")
    handler.wfile.write(b"many\r\n" + CONTENT[:100])


def hangs_up(handler):
    handler.connection.close()


def speaks_no_http(handler):
    handler.wfile.write(b"220 this is no web server\r\n\r\n")


def long_header(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n")


def not_found(handler):
    handler.send_error(404)


def broken(handler):
    handler.send_error(500, "wires\tcut")


def redirects_to_itself(handler):
    handler.head(302, Location=handler.path)


def redirects_to_a_file(handler):
    handler.head(302, Location="file:///etc/hostname")


def wrong_bytes(handler):
    good(handler, CONTENT[::-1])


def sign_in_page(handler):
    handler.head(200, Content_Type="text/html")
    handler.wfile.write(b"<html>Please sign in to this network.</html>")


def wrong_range(handler):
    handler.head(206, Content_Length=len(CONTENT), Content_Range=f"bytes 7-{len(CONTENT)}/{len(CONTENT)}")
    handler.wfile.write(CONTENT)


def silent(handler):
    handler.server.closing.wait(5)


def dribbles(handler):
    handler.head(200, Content_Length=len(CONTENT))
    for i in range(100):
        handler.wfile.write(CONTENT[i : i + 1])
        if handler.server.closing.wait(0.02):
            return


def endless(handler):
    handler.head(200)
    while not handler.server.closing.is_set():
        handler.wfile.write(CONTENT)


BAD = {
    not_found: "404",
    broken: "500",
    hangs_up: "closed connection",
    speaks_no_http: "220 this is no web server",
    long_header: "header line",
    redirects_to_itself: "302",
    redirects_to_a_file: "file:///etc/hostname",
    closes_early: "",
    closes_early_without_ranges: "closed after 60000 of 150000 bytes",
    breaks_a_chunk: "IncompleteRead",
    nonsense_chunk: "IncompleteRead",
    wrong_bytes: "wrong checksum",
    sign_in_page: "wrong checksum",
    silent: "timed out",
    dribbles: "slower than 1000 bytes a second",
    endless: "sends more than 200000 bytes",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda mirror: mirror.__name__)
def test_a_bad_mirror_costs_only_its_turn(server, tmp_path, monkeypatch, bad):
    """The second mirror is asked, and the file is right; with bad mirrors alone, one line says what each did."""
    monkeypatch.setattr(downloads, "_LARGEST", 200_000)
    monkeypatch.setattr(downloads, "_TRIES", 2)
    if bad in (silent, dribbles):
        monkeypatch.setattr(downloads, "_TIMEOUT", 0.5)
    target, part = tmp_path / "file", tmp_path / "file.part"
    downloads.fetch([server.url(bad), server.url(good)], target, MD5, quiet=True)
    assert target.read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]
    target.unlink()
    with pytest.raises(UserError, match="could not download file") as error:
        downloads.fetch([url := server.url(bad)], target, MD5, quiet=True)
    line = " ".join(str(error.value).split())
    assert url in line and BAD[bad] in line and str(tmp_path) in line
    assert not target.exists() and part.exists() == ("bytes are kept" in line)
    if part.exists():
        assert CONTENT.startswith(part.read_bytes())


@pytest.mark.parametrize("mirror", [good, without_ranges, without_length])
@pytest.mark.parametrize("have", [0, 1, 100_000, len(CONTENT) - 1])
def test_what_is_there_is_continued(server, tmp_path, mirror, have):
    (tmp_path / "file.part").write_bytes(CONTENT[:have])
    downloads.fetch([server.url(mirror)], tmp_path / "file", MD5, quiet=True)
    assert (tmp_path / "file").read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]
    assert [span for _, span in server.asked] == [f"bytes={have}-" if have else None]


def test_a_complete_part_needs_no_server(tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    downloads.fetch([], tmp_path / "file", MD5)
    assert os.listdir(tmp_path) == ["file"]
    downloads.fetch([], tmp_path / "file", MD5)  # nor does the file


@pytest.mark.parametrize("mirror", [good, without_ranges])
@pytest.mark.parametrize(
    "part", [CONTENT + b"more", CONTENT[:-1] + b"?", b"something else", b"?" * len(CONTENT)], ids=len
)
def test_a_wrong_part_is_started_again_once(server, tmp_path, mirror, part):
    (tmp_path / "file.part").write_bytes(part)
    downloads.fetch([server.url(mirror)], tmp_path / "file", MD5, quiet=True)
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.asked) <= 2


def test_wrong_bytes_are_asked_for_once(server, tmp_path):
    with pytest.raises(UserError, match="wrong checksum"):
        downloads.fetch([server.url(wrong_bytes)], tmp_path / "file", MD5, quiet=True)
    assert len(server.asked) == 1 and os.listdir(tmp_path) == []


def test_a_mirror_that_closes_early_is_continued(server, tmp_path):
    """As long as it brings something; what came is kept for the next mirror, and for the next run."""
    downloads.fetch([server.url(closes_early)], tmp_path / "file", MD5, quiet=True)
    assert [span for _, span in server.asked] == [None, "bytes=40000-", "bytes=80000-", "bytes=120000-"]
    server.asked.clear()
    with pytest.raises(UserError, match="60000 bytes are kept"):
        downloads.fetch([server.url(closes_early_without_ranges)], tmp_path / "next", MD5, quiet=True)
    assert (tmp_path / "next.part").read_bytes() == CONTENT[:60_000]
    downloads.fetch([server.url(not_found), server.url(good)], tmp_path / "next", MD5, quiet=True)
    assert (tmp_path / "next").read_bytes() == CONTENT and server.asked[-1][1] == "bytes=60000-"


@pytest.mark.parametrize("bad", [not_found, hangs_up, wrong_range, closes_early_without_ranges])
def test_a_failing_mirror_takes_nothing_away(server, tmp_path, bad):
    (tmp_path / "file.part").write_bytes(CONTENT[:100_000])
    with pytest.raises(UserError, match="100000 bytes are kept"):
        downloads.fetch([server.url(bad)], tmp_path / "file", MD5, quiet=True)
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:100_000]


def test_redirects_are_followed(server, tmp_path):
    where = server.url(good)

    def moved(handler):
        handler.head(301, Location=where)

    (tmp_path / "file.part").write_bytes(CONTENT[:10])
    downloads.fetch([server.url(moved)], tmp_path / "file", MD5, quiet=True)
    assert (tmp_path / "file").read_bytes() == CONTENT and server.asked[-1][1] == "bytes=10-"


def test_links_are_not_followed(server, tmp_path):
    """A link where the part or the file should go is replaced; what it points to stays as it is."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    for name in ("file", "file.part"):
        (tmp_path / name).symlink_to(precious)
    downloads.fetch([server.url(good)], tmp_path / "file", MD5, quiet=True)
    assert (tmp_path / "file").read_bytes() == CONTENT and not (tmp_path / "file").is_symlink()
    assert precious.read_bytes() == b"precious"


def test_two_downloads_of_a_file_do_not_mix(server, tmp_path):
    with downloads.lock(tmp_path / "file.part.lock", ""):
        with pytest.raises(UserError, match=r"file.part is being written by another download"):
            downloads.fetch([server.url(good)], tmp_path / "file", MD5, quiet=True)
    downloads.fetch([server.url(good)], tmp_path / "file", MD5, quiet=True)


def test_progress_counts_bytes(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "tqdm", lambda **options: tqdm(**{**options, "delay": 0, "mininterval": 0}))
    (tmp_path / "file.part").write_bytes(CONTENT[:75_000])
    downloads.fetch([server.url(good)], tmp_path / "file", MD5)
    bar = capsys.readouterr().err
    assert "file: " in bar and "k/150k [" in bar and "B/s" in bar
    (tmp_path / "file").unlink()
    downloads.fetch([server.url(good)], tmp_path / "file", MD5, quiet=True)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------------
# Whole datasets


def serve_folder(server, monkeypatch, name, files):
    """Let dataset `name` come from the server: files {name: content}."""
    for file, content in files.items():
        server.mirrors[f"/{file}"] = lambda handler, content=content: good(handler, content)
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    checksums = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(downloads.SOURCES, name, ([url], checksums))


def test_mnist_is_downloaded_and_read_once(server, tmp_path, monkeypatch):
    """By init_directory.py; what can be read, whatever its checksums, is not wanted again; a damaged file is."""
    source = write_mnist(tmp_path / "source")
    serve_folder(
        server, monkeypatch, "MNIST", {f"{n}.gz": next(source.glob(f"{n}*")).read_bytes() for n in data.IDX_FILES}
    )
    command = ("init_directory.py", "--download", "MNIST")
    reads, read_idx = [], data._idx
    monkeypatch.setattr(data, "_idx", lambda *arguments: reads.append(1) or read_idx(*arguments))
    folder = tmp_path / "data" / "MNIST" / "raw"
    for requests in (4, 0):
        server.asked.clear()
        reads.clear()
        status, output, error = run_inside(*command, output=tmp_path)
        assert status == 0, error
        assert output == f"MNIST-like, 30 images: 30 training and 20 test images in {folder}\n"
        assert len(server.asked) == requests and len(reads) == 4
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"")
    server.asked.clear()
    assert run_inside(*command, "--quiet", output=tmp_path) == (0, "", "")
    assert [path for path, _ in server.asked] == ["/t10k-labels-idx1-ubyte.gz"]
    server.mirrors["/t10k-labels-idx1-ubyte.gz"] = not_found
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    status, output, error = run_inside(*command, output=tmp_path)
    assert status == 2 and output == "" and error.count("\n") == 1
    assert error.startswith("error: could not download t10k-labels-idx1-ubyte.gz") and "404" in error


def test_cifar_is_unpacked(server, tmp_path, monkeypatch):
    """Also by a run that continues one interrupted while it unpacked; a link in the way is replaced."""
    monkeypatch.setattr(data, "CIFAR_RECORDS", 20)
    source, archive = write_cifar(tmp_path / "source" / "cifar-10-batches-bin", 20), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(source, arcname=source.name)
    serve_folder(server, monkeypatch, "CIFAR10", {"cifar-10-binary.tar.gz": archive.getvalue()})
    target = tmp_path / "data" / "cifar-10-batches-bin"
    target.mkdir(parents=True)
    (target.parent / "cifar-10-binary.tar.gz").write_bytes(archive.getvalue())
    (tmp_path / "precious").write_bytes(b"precious")
    (target / "test_batch.bin").symlink_to(tmp_path / "precious")
    loaded = downloads.download("CIFAR10", tmp_path / "data", quiet=True)
    assert loaded.x.shape == (100, 3072) and loaded.label == "CIFAR-10-like, 100 images" and not server.asked
    assert os.listdir(tmp_path / "data") == ["cifar-10-batches-bin"] and len(os.listdir(target)) == 6
    assert (tmp_path / "precious").read_bytes() == b"precious"
    for file in target.iterdir():
        assert (
            file.read_bytes() == (source / file.name).read_bytes() and file.stat().st_mode & 0o777 == 0o644 & ~umask()
        )
        file.unlink()
    assert downloads.download("CIFAR10", tmp_path / "data", quiet=True).files == loaded.files and server.asked


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_published_sources_have_every_file():
    assert tuple(downloads.SOURCES) == data.FULL_SIZE
    for urls, files in downloads.SOURCES.values():
        assert all(url.endswith("/") for url in urls) and all(len(checksum) == 32 for checksum in files.values())
    embedded = (data.ROOT / "data" / "mnist-mini" / "t10k-images-idx3-ubyte.gz").read_bytes()
    assert downloads.SOURCES["MNIST"][1]["t10k-images-idx3-ubyte.gz"] == hashlib.md5(embedded).hexdigest()
    with pytest.raises(UserError, match="cannot download 'mnist-mini'"):
        downloads.download("mnist-mini")


def test_init_directory(tmp_path):
    status, _, error = run_inside("init_directory.py", output=tmp_path)
    assert status == 0, error
    assert all((tmp_path / folder).is_dir() for folder in ("data", "figures", "results"))
    status, _, error = run_inside("init_directory.py", "--download", "SVHN", output=tmp_path)
    assert status == 2 and "error: " in error and "SVHN" in error and len(error.strip().splitlines()) == 1
