"""Downloads: servers that cut, lie, hang and change their minds; archives that are broken or mean harm."""
import errno
import hashlib
import io
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from eo_ddpm import download as dl
from eo_ddpm.data import SEASONS, find_patches
from eo_ddpm.download import ARCHIVES, Archive, check_disk, download, fetch, safe_path, unpack

BODY = np.random.default_rng(0).bytes(300_000)  # more than one chunk
OTHER = np.random.default_rng(1).bytes(300_000) # a second version of the same length
MD5 = hashlib.md5(BODY).hexdigest()
RUNS = settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch):
    "No test may talk to the world, nor through a proxy."
    connect, look_up = socket.socket.connect, socket.getaddrinfo
    def guard(host): assert host in ("127.0.0.1", "::1"), f"a test wants to reach {host}"
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: guard(address[0]) or connect(self, address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kwargs: guard(host) or look_up(host, *args, **kwargs))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("EO_DDPM_MIRROR", raising=False)


class Web:
    "A server whose next replies are told in advance: `script` is a list of dicts, empty means serve well."
    def __init__(self):
        web, self.body, self.tag, self.script, self.log = self, BODY, '"1"', [], []
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def do_GET(self): web.reply(self, **(web.script.pop(0) if web.script else {}))
            def log_message(self, *args): pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None
        self.release = threading.Event()  # ends the silence
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.base}/file.bin"

    def reply(self, h, status=None, cut=None, ranges=True, if_range=True, tag=..., date=None, length=0, silent=False, extra=b"",
              span=None, chunked=False, keep=False, body=None, kind=None, shift=0):
        "One reply; each argument is one way to misbehave."
        body, tag = self.body if body is None else body, self.tag if tag is ... else tag
        asked = re.fullmatch(r"bytes=(\d+)-", h.headers.get("Range", ""))
        same = not if_range or h.headers.get("If-Range", tag or date) == (tag or date)
        start = int(asked[1])+shift if asked and ranges and same else 0
        self.log.append((h.headers.get("Range"), h.headers.get("If-Range"), h.path))
        h.close_connection = not keep
        if status is None: status = 416 if start >= len(body) and start else 206 if start else 200
        h.send_response(status)
        if tag: h.send_header("ETag", tag)
        if date: h.send_header("Last-Modified", date)
        if kind: h.send_header("Content-Type", kind)
        if status == 416:
            if span != "": h.send_header("Content-Range", span or f"bytes */{len(body)}")
            h.send_header("Content-Length", "0")
            return h.end_headers()
        if status >= 400:
            h.send_header("Content-Length", "0")
            return h.end_headers()
        rest = body[start:]
        if status == 206 and span != "": h.send_header("Content-Range", span or f"bytes {start}-{len(body)-1}/{len(body)}")
        if chunked: h.send_header("Transfer-Encoding", "chunked")
        elif length is not None: h.send_header("Content-Length", str(len(rest)+length))
        h.end_headers()
        if chunked: rest = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in (rest[i:i+9999] for i in range(0, len(rest), 9999)))+b"0\r\n\r\n"
        h.wfile.write(rest[:cut]+extra)
        if silent or keep: self.release.wait(5)


@pytest.fixture(scope="module")
def one_server():
    web = Web()
    yield web
    web.release.set()
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def web(one_server):
    "The server as new."
    one_server.body, one_server.tag, one_server.script, one_server.log = BODY, '"1"', [], []
    one_server.release.clear()
    yield one_server
    one_server.release.set()


class Ftp:
    "As much of an FTP server as one download needs; each attribute is one way to misbehave."
    def __init__(self):
        self.body, self.changed, self.cuts, self.log = BODY, "20190101000000", [], []
        self.rest, self.size, self.final = True, True, b"226 done"
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"ftp://m1474000:secret%21@127.0.0.1:{self.socket.getsockname()[1]}/dir/file.bin"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try: session, _ = self.socket.accept()
            except OSError: return
            threading.Thread(target=self.talk, args=(session,), daemon=True).start()

    def talk(self, session):
        with session, session.makefile("rb") as lines: self.obey(session, lines)

    def obey(self, session, lines):
        say = lambda line: session.sendall(line+b"\r\n")
        say(b"220 hello")
        start, passive = 0, None
        for line in lines:
            command, _, argument = line.decode().strip().partition(" ")
            self.log.append((command, argument))
            if command == "USER": say(b"331 password?")
            elif command == "PASS": say(b"230 in")
            elif command == "TYPE": say(b"200 binary")
            elif command == "SIZE" and self.size: say(b"213 %d" % len(self.body))
            elif command == "MDTM" and self.changed: say(b"213 "+self.changed.encode())
            elif command == "REST" and self.rest:
                start = int(argument)
                say(b"350 from there")
            elif command == "PASV":
                if passive: passive.close()
                passive = socket.create_server(("127.0.0.1", 0))
                port = passive.getsockname()[1]
                say(b"227 (127,0,0,1,%d,%d)" % (port >> 8, port & 255))
            elif command == "RETR":
                say(b"150 here it comes")
                data, _ = passive.accept()
                passive.close()
                cut = self.cuts.pop(0) if self.cuts else None
                with data: data.sendall(self.body[start:][:cut])
                say(self.final if cut is None else b"426 broken")
                start = 0
            else: say(b"502 no")


@pytest.fixture
def ftp():
    server = Ftp()
    yield server
    server.socket.close()


def get(urls, path, md5=MD5, retries=40, pause=0., timeout=5., **kwargs):
    "`fetch` without the waiting."
    return fetch(urls, path, md5=md5, retries=retries, pause=pause, timeout=timeout, **kwargs)


@pytest.fixture
def fresh(tmp_path):
    "A new path for each example."
    count = iter(range(10**6))
    return lambda: tmp_path/f"{next(count)}"/"file.bin"


def whole(path, body=BODY):
    "Right bytes under the final name, nothing else in the folder."
    return path.read_bytes() == body and [p.name for p in path.parent.iterdir()] == [path.name]


# the table

def test_table():
    "Catches a name, an address or a fingerprint lost on the way into the table."
    assert len(ARCHIVES) == 14
    assert {n for n in ARCHIVES if n.startswith("sen12ms")} == {f"sen12ms-{s}-{k}" for s in SEASONS for k in ("s1", "s2", "lc")}
    assert len({a.md5 for a in ARCHIVES.values()}) == 14 and all(re.fullmatch("[0-9a-f]{32}", a.md5) for a in ARCHIVES.values())
    for name, a in ARCHIVES.items():
        assert all(a.file in url and urlsplit(url).scheme in ("https", "ftp") for url in a.urls)
        assert a.page.startswith("https://") and a.licence in ("CC-BY 4.0", "MIT")
        if name.startswith("sen12ms"): assert a.file == "_".join([SEASONS[name.split("-")[1]], name.split("-")[2]])+".tar.gz"


def test_fingerprints_stand_in_their_rows():
    "Catches sums shifted by one row: first, last and the report's own, as published."
    assert ARCHIVES["sen12ms-spring-lc"].md5 == "6e2e8fa8b8cba77ddab49fd20ff5c37b"
    assert ARCHIVES["sen12ms-summer-s2"].md5 == "4dbaf72ecb704a4794036fe691427ff3"
    assert ARCHIVES["sen12ms-winter-s2"].md5 == "3807545661288dcca312c9c538537b63"
    assert (ARCHIVES["eurosat"].size, ARCHIVES["eurosat-ms"].size) == (94658721, 2065402329)


# http that behaves

def test_plain_download(web, fresh):
    "Catches bytes lost or doubled where nothing goes wrong, and left-over parts."
    assert whole(get(web.url, fresh()))
    assert len(web.log) == 1 and web.log[0][:2] == (None, None)


def test_whole_file_needs_no_server(web, fresh):
    "Catches a second download of what is already here."
    path = get(web.url, fresh())
    web.log.clear()
    assert get(web.url, path, size=len(BODY)) == path and web.log == []


@pytest.mark.parametrize("size, md5, message", [(5, None, "has 300,000 bytes, expected 5"), (None, "0"*32, f"has md5 {MD5}, expected 000")])
def test_wrong_file_under_the_final_name(web, fresh, size, md5, message):
    "Catches a half file, put there by hand, taken for whole; and a user's file deleted unasked."
    path = get(web.url, fresh())
    with pytest.raises(ValueError, match=message): get(web.url, path, md5=md5, size=size)
    assert whole(path)


@pytest.mark.parametrize("reply", [dict(chunked=True), dict(length=None), dict(keep=True), dict(tag=None), dict(tag='W/"1"')])
def test_other_ways_to_send(web, fresh, reply):
    "Catches trouble with no announced length, chunks, a connection left open, no version."
    web.script = [reply]
    assert whole(get(web.url, fresh(), timeout=.3))


def test_empty_file(web, fresh):
    "Catches a length of 0 taken for an unknown one."
    web.body = b""
    assert whole(get(web.url, fresh(), md5=None, size=0), b"")


# http that breaks off

@RUNS
@given(st.lists(st.integers(0, 120_000), max_size=8))
def test_cut_anywhere(web, fresh, cuts):
    "Catches a byte lost or doubled at the seam, wherever the connection breaks."
    web.script = [dict(cut=c) for c in cuts]
    assert whole(get(web.url, fresh()))


@pytest.mark.parametrize("k", [0, 1, 65_535, 65_536, 65_537, len(BODY)-1])
@pytest.mark.parametrize("md5", [MD5, None])
def test_cut_once_asks_for_the_rest(web, fresh, k, md5):
    "Catches a resume that starts anew, or asks without If-Range."
    web.script = [dict(cut=k)]
    assert whole(get(web.url, fresh(), md5=md5))
    assert web.log[1][:2] == ((f"bytes={k}-", '"1"') if k else (None, None))


@pytest.mark.parametrize("cut", [1, 70_000])
def test_chunked_cut(web, fresh, cut):
    "Catches the end of a broken chunked body taken for the end of the file."
    web.script = [dict(chunked=True, cut=cut)]
    assert whole(get(web.url, fresh(), md5=None)) and len(web.log) == 2


def test_range_ignored(web, fresh):
    "Catches a whole file appended to the part of it."
    web.script = [dict(cut=100_000), dict(ranges=False, cut=50_000), dict(ranges=False)]
    assert whole(get(web.url, fresh()))


def test_wrong_range(web, fresh):
    "Catches other bytes than asked for, glued on: Content-Range was not looked at."
    for reply in (dict(shift=-1), dict(shift=1), dict(span=""), dict(span="nonsense"), dict(span=f"bytes 100000-299999/{len(BODY)+1}")):
        web.script = [dict(cut=100_000), reply]
        assert whole(get(web.url, fresh(), md5=None))


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("versions", [dict(tag='"2"'), dict(tag=None), dict(tag=None, date="Tue, 01 Jan 2019 00:00:00 GMT")])
def test_file_changes_between_two_attempts(web, fresh, if_range, versions):
    "Catches the head of one version on the tail of the other; also where the server ignores If-Range."
    path = fresh()
    first = dict(versions, date="Mon, 31 Dec 2018 00:00:00 GMT") if "date" in versions else {}
    web.script = [dict(first, cut=100_000)]+[dict(versions, body=OTHER, if_range=if_range)]*3
    assert whole(get(web.url, path, md5=None), OTHER)


@settings(RUNS, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 299_999), st.booleans(), st.booleans()), max_size=6))
def test_never_spliced(web, fresh, replies):
    "Catches any order of cuts, versions and missing ETags that makes a file which never existed."
    web.script = [dict(body=OTHER if other else BODY, tag=f'"{other}"' if tagged else None, cut=cut, if_range=obeys)
                  for other, cut, tagged, obeys in replies]
    path = get(web.url, fresh(), md5=None)
    assert whole(path) or whole(path, OTHER)


@RUNS
@given(st.lists(st.sampled_from([dict(cut=0), dict(cut=70_000), dict(cut=200_000, ranges=False), dict(status=500), dict(status=404),
                                 dict(length=-50_000), dict(length=9), dict(extra=b"xx"), dict(chunked=True, cut=90_000), dict(status=416),
                                 dict(span="bytes 5-9/10"), dict(span=""), dict(kind="text/html"), dict(tag='W/"x"', cut=66_000),
                                 dict(length=None, cut=299_999)]), max_size=7))
def test_any_mischief_then_good(web, fresh, script):
    "Catches a state of the part from which a good server can't lead back. The size is known: without, a cut body may end early."
    web.script = list(script)
    assert whole(get(web.url, fresh(), size=len(BODY)))


def test_416_when_complete(web, fresh):
    "Catches a part that is whole, of unknown length, asked for in vain for ever; and a 416 about another length."
    path = fresh()
    path.parent.mkdir()
    part = path.with_name("file.bin.part")
    part.write_bytes(BODY)
    assert whole(get(web.url, path)) and len(web.log) == 1  # 416, Content-Range: bytes */300000
    for junk in (BODY+b"x", BODY[:5]):
        path.unlink()
        part.write_bytes(junk)
        web.script = [dict(status=416, span="")]  # says nothing about the length
        assert whole(get(web.url, path))
        web.script = []


def test_complete_part_needs_no_server(web, fresh):
    "Catches a kill between the last byte and the renaming that costs a connection."
    path = fresh()
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(BODY)
    assert whole(get(web.url, path, size=len(BODY))) and web.log == []


@pytest.mark.parametrize("junk", [b"", b"{", b"null", b"[1]", b"\xff\xfe", b'{"tag": 5}'])
def test_broken_note(web, fresh, junk):
    "Catches a crash over a half-written note beside the part."
    path = fresh()
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(BODY[:1000])
    path.with_name("file.bin.part.json").write_bytes(junk)
    assert whole(get(web.url, path))


def test_part_without_any_voucher_starts_anew(web, fresh):
    "Catches a part of unknown origin continued where neither version nor md5 can tell."
    path = fresh()
    path.parent.mkdir()
    path.with_name("file.bin.part").write_bytes(OTHER[:1000])
    assert whole(get(web.url, path, md5=None)) and web.log[0][0] is None


# http that lies, hangs, refuses

def test_wrong_bytes(web, fresh):
    "Catches damage on the way, and a wrong part kept so that every later call fails too."
    path = fresh()
    web.script = [dict(body=OTHER)]
    with pytest.raises(ValueError, match=f"file.bin has md5 {hashlib.md5(OTHER).hexdigest()}, expected {MD5}"): get(web.url, path)
    assert list(path.parent.iterdir()) == []
    assert whole(get(web.url, path))


@pytest.mark.parametrize("reply, message", [
    (dict(length=1000), "broke off at byte"), (dict(length=-1000), "sent more than the 299,000 bytes announced"),
    (dict(extra=b"x"), "sent more than the 300,000"),
])
def test_lies_about_length(web, fresh, reply, message):
    "Catches a file cut at a length that the server only claimed, or with bytes too many."
    path = fresh()
    web.script = [reply]*3
    with pytest.raises(ConnectionError, match=message): get(web.url, path, md5=None, retries=0)
    assert not path.exists()
    web.script = [reply]
    assert whole(get(web.url, path, md5=None))


def test_published_size_wins(web, fresh):
    "Catches a server with another file than the one published, before its bytes come."
    with pytest.raises(ConnectionError, match="offers 300,000 bytes, expected 300,001"): get(web.url, fresh(), size=300_001, retries=0)


def test_longer_than_published_without_length(web, fresh):
    "Catches a stream without announced length that runs past the published size."
    web.script = [dict(length=None)]
    with pytest.raises(ConnectionError, match="sent more than the 200,000"): get(web.url, fresh(), size=200_000, retries=0)


@pytest.mark.parametrize("cut", [0, 100_000])
def test_silence(web, fresh, cut):
    "Catches a wait for ever on a server that says nothing more; then goes on from there."
    path, begin = fresh(), time.monotonic()
    web.script = [dict(cut=cut, silent=True)]*2
    with pytest.raises(ConnectionError, match="timed out"): get(web.url, path, timeout=.3, retries=0)
    assert time.monotonic()-begin < 4
    assert path.with_name("file.bin.part").stat().st_size == cut
    web.release.set()
    web.script = []
    assert whole(get(web.url, path))


@pytest.mark.parametrize("scheme", ["http", "ftp"])
def test_silence_before_the_first_word(fresh, scheme):
    "Catches a timeout that counts only once the reply has begun."
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"{scheme}://127.0.0.1:{mute.getsockname()[1]}/file.bin"
        with pytest.raises(ConnectionError, match="timed out"): get(url, fresh(), timeout=.2, retries=1)


@pytest.mark.parametrize("status", [404, 403, 500, 503, 204])
def test_refused_then_recovers(web, fresh, status):
    "Catches a give-up at the first refusal, and an error page saved as data."
    web.script = [dict(status=status)]*2+[dict(cut=5000), dict(status=status)]
    assert whole(get(web.url, fresh()))


def test_login_page_of_a_hotel(web, fresh):
    "Catches a web page with status 200 that replaces what came so far."
    path = fresh()
    web.script = [dict(cut=100_000), dict(body=b"<html>", kind="text/html; charset=utf-8", ranges=False)]
    with pytest.raises(ConnectionError, match="a web page instead"): get(web.url, path, retries=1)
    assert path.with_name("file.bin.part").stat().st_size == 100_000


def test_never_for_ever(web, fresh, monkeypatch):
    "Catches endless retries, a pause that does not grow, and one that grows without bound."
    pauses = []
    monkeypatch.setattr(dl.time, "sleep", pauses.append)
    web.script = [dict(status=500)]*99
    with pytest.raises(ConnectionError, match="no mirror gave it whole"): get(web.url, fresh(), retries=8, pause=1.)
    assert len(web.log) == 9 and pauses == [2, 4, 8, 16, 32, 60, 60, 60]


def test_progress_is_no_failure(web, fresh, monkeypatch):
    "Catches a large file that may break off only `retries` times in all; and a server that starts anew each time, retried for ever."
    monkeypatch.setattr(dl, "STEP", 1000)
    web.script = [dict(cut=20_000) for _ in range(14)]
    assert whole(get(web.url, fresh(), retries=0))
    web.script = [dict(cut=20_000, ranges=False) for _ in range(99)]
    with pytest.raises(ConnectionError): get(web.url, fresh(), retries=3)


def test_ctrl_c_leaves_the_part(web, fresh, monkeypatch):
    "Catches an interrupt that throws away what came, or that is taken for a failed connection."
    path, body = fresh(), dl.body
    def interrupted(*args):
        for i, chunk in enumerate(body(*args)):
            if i == 2: raise KeyboardInterrupt
            yield chunk
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(dl, "body", interrupted)
        get(web.url, path)
    kept = path.with_name("file.bin.part").stat().st_size
    assert 0 < kept < len(BODY)
    assert whole(get(web.url, path)) and web.log[-1][0] == f"bytes={kept}-"


def test_progress_starts_where_it_resumes(web, fresh, monkeypatch):
    "Catches a bar that starts at 0 after a break, so that the time left is wrong."
    bars, bar = [], dl.tqdm
    monkeypatch.setattr(dl, "tqdm", lambda *args, **kwargs: bars.append(kwargs) or bar(*args, **kwargs))
    web.script = [dict(cut=1234)]
    get(web.url, fresh())
    assert [(b.get("initial"), b["total"], b["unit"]) for b in bars[:2]] == [(0, len(BODY), "B"), (1234, len(BODY), "B")]


# mirrors

def test_second_mirror_goes_on(web, fresh):
    "Catches a mirror that starts anew though the md5 vouches for both; and another mirror's ETag sent in If-Range."
    with served(OTHER[:1]) as dead: pass
    web.script = [dict(cut=100_000), dict(tag='"other"')]
    assert whole(get((dead.url, web.url, web.url+"2"), fresh()))
    assert [entry[:2] for entry in web.log] == [(None, None), ("bytes=100000-", None)]


def test_mirrors_without_md5_are_not_mixed(web, fresh):
    "Catches the halves of two mirrors glued together where nothing vouches for them."
    web.script = [dict(cut=100_000), dict(status=500), dict(status=500), dict(body=OTHER, tag='"other"')]
    path = get((web.url, web.url+"2"), fresh(), md5=None)
    assert whole(path) or whole(path, OTHER)


def test_mirror_with_a_file_of_another_length(web, fresh):
    "Catches a mirror's other file glued on, until the md5 throws away both: its length already tells."
    web.script = [dict(cut=100_000), dict(body=OTHER+b"x", tag='"other"')]
    assert whole(get((web.url, web.url+"2"), fresh()))


def test_mirror_without_range_must_wait(web, fresh):
    "Catches gigabytes thrown away on a server that can't resume, while the next one can."
    with served(BODY, ranges=False) as deaf:
        path = fresh()
        path.parent.mkdir()
        path.with_name("file.bin.part").write_bytes(BODY[:200_000])
        assert whole(get((deaf.url, web.url), path))
        assert len(deaf.log) == 1 and web.log[0][0] == "bytes=200000-"
        path.unlink()
        path.with_name("file.bin.part").write_bytes(BODY[:200_000])
        assert whole(get(deaf.url, path))  # alone, it may start anew


def test_all_mirrors_down(fresh):
    "Catches an error that does not say what each mirror answered and how to get on by hand."
    with served(BODY, status=503) as a, served(BODY) as b: b.server.server_close()
    path = fresh()
    with pytest.raises(ConnectionError) as e: get((a.url, b.url), path, retries=1, page="https://example.org/here")
    for words in (a.url, b.url, "file.bin", "by hand from https://example.org/here", str(path.absolute()), "same command", "unpacking"):
        assert words in str(e.value)


@contextmanager
def served(body, **habit):
    "One more server, always with the same habit; gone after the block."
    web = Web()
    web.body, web.script = body, [habit]*99
    try: yield web
    finally:
        web.server.shutdown()
        web.server.server_close()


@pytest.mark.parametrize("url", ["file:///etc/hosts", "sftp://127.0.0.1/x", "/etc/hosts", "127.0.0.1/x"])
def test_unknown_scheme(url, fresh):
    "Catches a local file copied by urllib, or endless retries of an address that can't work."
    with pytest.raises(ValueError, match="expected http, https or ftp"): get(url, fresh())


# ftp

@pytest.mark.parametrize("cuts", [[], [0], [1], [100_000, 65_536, 70_000], [len(BODY)-1]])
@pytest.mark.parametrize("size", [True, False])
def test_ftp_resumes(ftp, fresh, cuts, size):
    "Catches FTP that starts anew, loses bytes at the seam, or takes a cut for the end where SIZE is unknown."
    ftp.cuts, ftp.size = list(cuts), size
    assert whole(get(ftp.url, fresh(), md5=None))
    assert ("PASS", "secret!") in ftp.log and ("RETR", "dir/file.bin") in ftp.log
    assert [int(a) for c, a in ftp.log if c == "REST"] == [n for n in np.cumsum(cuts) if n]


def test_ftp_without_rest(ftp, fresh):
    "Catches a whole file appended to its part where the server refuses REST."
    ftp.cuts, ftp.rest = [100_000], False
    assert whole(get(ftp.url, fresh()))


@pytest.mark.parametrize("before, after", [("20190101000000", "20200101000000"), (None, None)])
def test_ftp_file_changes(ftp, fresh, before, after):
    "Catches two versions spliced by FTP, which knows no If-Range; without a time only a new start is safe."
    path, ftp.changed, ftp.cuts = fresh(), before, [100_000]
    with pytest.raises(ConnectionError): get(ftp.url, path, md5=None, retries=0)
    ftp.changed, ftp.body = after, OTHER
    assert whole(get(ftp.url, path, md5=None), OTHER)


def test_ftp_after_http(web, ftp, fresh):
    "Catches the two mirrors of SEN12MS not taking turns: http breaks off, ftp goes on."
    web.script = [dict(cut=123_456)]+[dict(status=503)]*9
    assert whole(get((web.url, ftp.url), fresh()))
    assert ("REST", "123456") in ftp.log


def test_part_longer_than_the_file(web, ftp, fresh):
    "Catches a part that is too long and so can never be completed."
    for url in (web.url, ftp.url):
        path = fresh()
        path.parent.mkdir()
        path.with_name("file.bin.part").write_bytes(BODY+b"x")
        assert whole(get(url, path, size=len(BODY), retries=1))


def test_ftp_down(ftp, fresh):
    "Catches an FTP error that escapes as something else than ConnectionError."
    ftp.final = b"451 disk trouble"
    ftp.size = False
    with pytest.raises(ConnectionError, match="451 disk trouble"): get(ftp.url, fresh(), retries=1)


# disk

def no_space(monkeypatch, free):
    monkeypatch.setattr(dl.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9-free, free))


@pytest.mark.parametrize("size", [len(BODY), None])
def test_full_disk(web, fresh, monkeypatch, size):
    "Catches a download that fills the disk, though size or Content-Length told it would; and retries of a full disk."
    no_space(monkeypatch, 299_999)
    with pytest.raises(OSError, match="needs 300,000 bytes, only 299,999 are free") as e: get(web.url, fresh(), size=size)
    assert e.value.errno == errno.ENOSPC and not isinstance(e.value, ConnectionError) and len(web.log) == 1


def test_disk_needs_only_the_rest(web, fresh, monkeypatch):
    "Catches a resume refused for space that the part already takes."
    path = fresh()
    web.script = [dict(cut=200_000)]
    with pytest.raises(ConnectionError): get(web.url, path, retries=0)
    no_space(monkeypatch, 100_000)
    assert whole(get(web.url, path))


def test_disk_is_checked_before_the_download(monkeypatch, tmp_path):
    "Catches hours of download for an archive that can't be unpacked."
    no_space(monkeypatch, 77*10**9)
    with pytest.raises(OSError, match="sen12ms-summer-s2: needs 78,000,000,000 bytes, only 77,000,000,000 are free"):
        download("sen12ms-summer-s2", tmp_path)


# kill

KILLED = """
import sys
from eo_ddpm import download as dl
dl.fetch(sys.argv[1], sys.argv[2], timeout=60)
"""


def test_kill_and_resume(web, fresh):
    "Catches a part that a killed process left unusable: the end must be byte-identical, and not from the start."
    path = fresh()
    part = path.with_name("file.bin.part")
    web.script = [dict(cut=200_000, silent=True)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, web.url, str(path)], env={**os.environ, "no_proxy": "*"})
    for _ in range(3000):
        if part.is_file() and part.stat().st_size > 50_000: break
        time.sleep(.01)
    process.kill()
    process.wait()
    kept = part.stat().st_size
    assert 0 < kept <= 200_000 and not path.exists()
    web.release.set()
    assert whole(get(web.url, path, md5=None)) and web.log[-1][:2] == (f"bytes={kept}-", '"1"')


# archives

FILES = {f"ROIs1868_summer/s2_{s}/ROIs1868_summer_s2_{s}_p{p}.tif": np.random.default_rng(p).bytes(3000+p)
         for s in (1, 2) for p in (1, 2, 10)}


def make_tar(path, files=FILES, mode="w:gz", **changes):
    "A tar of these files; `changes` are set on the last member."
    with tarfile.open(path, mode) as tar:
        for i, (name, data) in enumerate(files.items(), start=1):
            m = tarfile.TarInfo(name)
            m.size = len(data)
            if i == len(files):
                for key, value in changes.items(): setattr(m, key, value)
            tar.addfile(m, io.BytesIO(data) if m.isreg() else None)
    return path


def make_zip(path, files=FILES, **changes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for i, (name, data) in enumerate(files.items(), start=1):
            m = zipfile.ZipInfo(name)
            m.filename = name  # as it is, on Windows too
            if i == len(files):
                for key, value in changes.items(): setattr(m, key, value)
            z.writestr(m, data)
    return path


MAKERS = {"tar": lambda path, *args, **kw: make_tar(path, *args, mode="w", **kw), "tar.gz": make_tar, "zip": make_zip}


def tree(folder):
    "Every file below a folder: relative name -> bytes."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(params=MAKERS)
def make(request, tmp_path):
    return lambda *args, **kw: MAKERS[request.param](tmp_path/f"a.{request.param}", *args, **kw)


def test_unpacks_what_was_packed(make, tmp_path):
    "Catches files lost, renamed or changed; folders as members, ./ in front, and an empty file."
    files = {**FILES, "./empty.txt": b""}
    assert unpack(make(files), tmp_path/"out") == tmp_path/"out"
    assert tree(tmp_path/"out") == {**FILES, "empty.txt": b""}
    assert [(p.scene, p.patch) for p in find_patches(tmp_path/"out")] == [(s, p) for s in (1, 2) for p in (1, 2, 10)]


def test_told_apart_by_content(tmp_path):
    "Catches trust in the file ending."
    unpack(make_zip(tmp_path/"a.tar.gz"), tmp_path/"one")
    unpack(make_tar(tmp_path/"b.zip"), tmp_path/"two")
    assert tree(tmp_path/"one") == tree(tmp_path/"two") == FILES


def test_folders_in_a_tar(tmp_path):
    "Catches a folder taken for a file; SEN12MS's own archives list their folders."
    source = tmp_path/"source"/"ROIs1868_summer"/"s2_1"
    source.mkdir(parents=True)
    (source/"ROIs1868_summer_s2_1_p1.tif").write_bytes(b"x")
    with tarfile.open(tmp_path/"a.tar", "w") as tar: tar.add(tmp_path/"source"/"ROIs1868_summer", "ROIs1868_summer")
    assert len(find_patches(unpack(tmp_path/"a.tar", tmp_path/"out"))) == 1


@pytest.mark.parametrize("name", [
    "../evil", "a/../../evil", "a/../evil", "/evil", "//host/evil", "C:/evil", "C:evil", "..\\evil", "a\\..\\..\\evil", "\\evil",
])
def test_names_that_lead_out(make, tmp_path, name):
    "Catches a member written outside the folder, by either slash, by drive or by .."
    before = set(tmp_path.rglob("*"))
    archive = make({"good": b"1", name: b"2"})
    with pytest.raises(ValueError, match="a\\.(tar|tar.gz|zip): refuses .*evil.*: leads out of"): unpack(archive, tmp_path/"out")
    assert {p.name for p in set(tmp_path.rglob("*"))-before} <= {"out", "good", "a.tar", "a.tar.gz", "a.zip"}
    assert not Path("/evil").exists()


@pytest.mark.parametrize("kind, target", [
    (tarfile.SYMTYPE, "/etc"), (tarfile.SYMTYPE, "../.."), (tarfile.SYMTYPE, "good"), (tarfile.LNKTYPE, "good"),
    (tarfile.LNKTYPE, "/etc/passwd"), (tarfile.CHRTYPE, ""), (tarfile.BLKTYPE, ""), (tarfile.FIFOTYPE, ""),
])
def test_links_and_devices_in_a_tar(tmp_path, kind, target):
    "Catches a link (symbolic or hard) or a device made on our disk."
    archive = make_tar(tmp_path/"a.tar", {"good": b"1", "bad": b""}, mode="w", type=kind, linkname=target)
    with pytest.raises(ValueError, match="a.tar: refuses 'bad': neither a file nor a folder"): unpack(archive, tmp_path/"out")
    assert tree(tmp_path/"out") == {"good": b"1"}


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_in_a_zip(tmp_path, mode):
    "Catches a zip's symlink unpacked as a link, or quietly as a file that holds its target."
    archive = make_zip(tmp_path/"a.zip", {"good": b"1", "bad": b"/etc/passwd"}, external_attr=(mode | 0o644) << 16, create_system=3)
    with pytest.raises(ValueError, match="refuses 'bad': neither a file nor a folder"): unpack(archive, tmp_path/"out")
    assert tree(tmp_path/"out") == {}, "names are checked before the first byte"


@pytest.mark.skipif(os.name == "nt", reason="making links needs rights")
def test_link_that_lies_in_the_folder(make, tmp_path):
    "Catches a write through a link that an earlier archive, or somebody else, left in the folder."
    (tmp_path/"home").mkdir()
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"trap").symlink_to(tmp_path/"home")
    with pytest.raises(ValueError, match="refuses 'trap/evil'"): unpack(make({"trap/evil": b"1"}), tmp_path/"out")
    assert tree(tmp_path/"home") == {}


@RUNS
@given(st.text(st.sampled_from("ab./\\:~ "), min_size=1, max_size=12))
def test_no_name_leads_out(tmp_path, name):
    "Catches a spelling of .. that nobody thought of."
    try: path = safe_path(tmp_path, name, True)
    except ValueError: return
    assert Path(os.path.normpath(path)).is_relative_to(tmp_path) and ".." not in path.parts


def test_bomb(make, tmp_path, monkeypatch):
    "Catches an archive whose declared size exceeds the disk; the zip is refused before its first byte."
    archive = make({"small": b"1", "large": bytes(50_000)})
    no_space(monkeypatch, 40_000)
    with pytest.raises(OSError, match="needs 50,00[01] bytes, only 40,000 are free"): unpack(archive, tmp_path/"out")
    assert tree(tmp_path/"out") == ({} if archive.suffix == ".zip" else {"small": b"1"})


def test_bomb_in_the_header(tmp_path):
    "Catches a tar that claims a petabyte in one header."
    m = tarfile.TarInfo("large")
    m.size = 10**15
    (tmp_path/"a.tar").write_bytes(m.tobuf(tarfile.GNU_FORMAT)+bytes(10_000))
    with pytest.raises(OSError, match="needs 1,000,000,000,000,000 bytes"): unpack(tmp_path/"a.tar", tmp_path/"out")


def test_truncated_anywhere(make, tmp_path):
    "Catches a cut archive that unpacks without complaint, or leaves a half file under its final name; also cut between two members."
    archive = make()
    data = archive.read_bytes()
    cuts = {0, 1, 2, 100, 511, 512, 513, len(data)//2, len(data)-1, len(data)//512//2*512}
    if archive.suffix == ".tar":
        with tarfile.open(archive) as tar: members = tar.getmembers()
        ends = {m.offset for m in members} | {m.offset_data for m in members} | {members[-1].offset_data+3072}  # the last: no end mark
        cuts = {c for c in cuts if c < members[-1].offset} | ends
    for k in sorted(cuts):
        archive.write_bytes(data[:k])
        with pytest.raises(ValueError, match="a\\.(tar|tar.gz|zip): truncated or damaged"): unpack(archive, tmp_path/"out")
        assert tree(tmp_path/"out").items() <= FILES.items(), f"a half file after a cut at {k}"
    archive.write_bytes(data)
    assert tree(unpack(archive, tmp_path/"out")) == FILES


@RUNS
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_one_damaged_byte(fresh, where, flip):
    "Catches a damaged byte in a tar.gz or zip that goes unnoticed, or an error that does not name the archive."
    for maker in (make_tar, make_zip):
        path = fresh()
        path.parent.mkdir()
        data = bytearray(maker(path).read_bytes())
        data[where % len(data)] ^= flip
        path.write_bytes(data)
        try: unpack(path, path.parent/"out")
        except ValueError as e: assert str(path) in str(e)
        except OSError: pass  # a size or a name that the disk refuses
        else: assert tree(path.parent/"out") == FILES or maker is make_zip  # a zip's names have no checksum


def test_damaged_tar_header(tmp_path):
    "Catches the silent half: tarfile takes a damaged header in the middle for the end of the archive."
    data = bytearray(make_tar(tmp_path/"a.tar", mode="w").read_bytes())
    with tarfile.open(tmp_path/"a.tar") as tar: offset = tar.getmembers()[3].offset
    data[offset+5] ^= 255
    (tmp_path/"a.tar").write_bytes(data)
    with pytest.raises(ValueError, match="truncated or damaged"): unpack(tmp_path/"a.tar", tmp_path/"out")


def test_gzip_checksum_is_read(tmp_path):
    "Catches a stop at the last member: the checksum that would show the damage stands after it."
    data = bytearray(make_tar(tmp_path/"a.tar.gz").read_bytes())
    data[-6] ^= 1
    (tmp_path/"a.tar.gz").write_bytes(data)
    with pytest.raises(ValueError, match="CRC"): unpack(tmp_path/"a.tar.gz", tmp_path/"out")


def test_no_archive(tmp_path):
    "Catches a web page or nothing at all taken for an archive without members."
    (tmp_path/"page.zip").write_bytes(b"<html>not found</html>"*100)
    with pytest.raises(ValueError, match="page.zip: truncated or damaged"): unpack(tmp_path/"page.zip", tmp_path/"out")
    with pytest.raises(FileNotFoundError, match="gone.zip"): unpack(tmp_path/"gone.zip", tmp_path/"out")


def test_locked_zip(tmp_path):
    "Catches a zip with a password that ends in a bare RuntimeError."
    data = bytearray(make_zip(tmp_path/"a.zip", {"x": b"1"}).read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)): data[data.index(mark)+at] |= 1
    (tmp_path/"a.zip").write_bytes(data)
    with pytest.raises(ValueError, match="a.zip: .*password"): unpack(tmp_path/"a.zip", tmp_path/"out")


def test_unpacked_files_are_kept(make, tmp_path):
    "Catches a second pass over what is there, and a half file kept since only its name was looked at."
    archive = make()
    unpack(archive, tmp_path/"out")
    first, second = list(FILES)[:2]
    (tmp_path/"out"/first).write_bytes(FILES[first][:100])
    os.utime(tmp_path/"out"/second, (1, 1))
    unpack(archive, tmp_path/"out")
    assert tree(tmp_path/"out") == FILES and (tmp_path/"out"/second).stat().st_mtime == 1


KILLED_UNPACKING = """
import os, shutil, sys
from eo_ddpm import download as dl
copy, count = shutil.copyfileobj, iter(range(99))
def dies(source, f, *args):
    if next(count) == 3:  # half of the fourth file, then the plug is pulled
        f.write(source.read(1500))
        f.flush()
        os._exit(9)
    copy(source, f, *args)
shutil.copyfileobj = dies
for archive, out in zip(sys.argv[1::2], sys.argv[2::2]):
    count = iter(range(99))
    if os.fork() if hasattr(os, "fork") else 0: os.wait()
    else: dl.unpack(archive, out)
"""


def test_kill_while_unpacking(tmp_path):
    "Catches a half file under its final name after a kill, which the next call would take for whole or find_patches would list."
    args = [str(x) for x in (make_tar(tmp_path/"a.tar.gz"), tmp_path/"tar", make_zip(tmp_path/"a.zip"), tmp_path/"zip")]
    subprocess.run([sys.executable, "-c", KILLED_UNPACKING, *args])
    for archive, out in zip(args[::2], args[1::2]):
        if os.name == "nt" and out.endswith("zip"): continue  # no fork: only the first one ran
        left = tree(out)
        assert sum(name in FILES for name in left) == 3
        assert all(data == FILES[name] for name, data in left.items() if name in FILES)
        assert len(find_patches(out)) == 3
        assert tree(unpack(archive, out)) == FILES


def test_old_python(tmp_path, monkeypatch):
    "Catches an unsafe way round where tarfile has no data filter: say which Python is needed."
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(RuntimeError, match="3.11.4"): unpack(make_tar(tmp_path/"a.tar.gz"), tmp_path/"out")


# one command

@pytest.fixture
def published(web, tmp_path, monkeypatch):
    "summer-s2, small, on our own server under its true name."
    data = make_tar(tmp_path/"source.tar.gz").read_bytes()
    web.body = data
    real = ARCHIVES["sen12ms-summer-s2"]
    small = Archive(real.file, (f"{web.base}/published/{real.file}",), None, hashlib.md5(data).hexdigest(), None, real.licence, real.page)
    monkeypatch.setitem(ARCHIVES, "sen12ms-summer-s2", small)
    return small


def test_download(published, web, tmp_path, capsys):
    "Catches a tree that find_patches can't read, and a finished download done again."
    out = download("sen12ms-summer-s2", tmp_path/"out")
    assert out == tmp_path/"out" and len(find_patches(out)) == 6 and (out/published.file).is_file()
    requests = len(web.log)
    assert download("sen12ms-summer-s2", out) == out and len(web.log) == requests
    assert f"delete {published.file}.done" in capsys.readouterr().out
    done = out/f"{published.file}.done"
    done.write_text("another md5")  # the table was corrected since: do it again
    download("sen12ms-summer-s2", out)
    assert done.read_text() == published.md5 and len(web.log) == requests, "the archive was there"


def test_archive_is_removed_only_at_the_end(published, web, tmp_path, monkeypatch):
    "Catches keep=False that deletes hours of download before the files are out; and a second run that fetches again."
    with monkeypatch.context() as m, pytest.raises(OSError):
        m.setattr(dl, "write_member", lambda *args: check_disk(tmp_path, 10**18, "x"))
        download("sen12ms-summer-s2", tmp_path/"out", keep=False)
    assert (tmp_path/"out"/published.file).is_file() and not list((tmp_path/"out").glob("*.done"))
    download("sen12ms-summer-s2", tmp_path/"out", keep=False)
    assert not (tmp_path/"out"/published.file).exists() and len(web.log) == 1
    download("sen12ms-summer-s2", tmp_path/"out")
    assert len(web.log) == 1


@pytest.mark.parametrize("by_name", [True, False])
def test_classroom_mirror(published, web, tmp_path, monkeypatch, by_name):
    "Catches a mirror that is not used, or an address put together wrongly, with or without a slash at its end."
    if by_name: download("sen12ms-summer-s2", tmp_path/"out", mirror=f"{web.base}/class/")
    else:
        monkeypatch.setenv("EO_DDPM_MIRROR", f"{web.base}/class")
        download("sen12ms-summer-s2", tmp_path/"out")
    assert [path for _, _, path in web.log] == [f"/class/{published.file}"]


def test_put_there_by_hand(published, web, tmp_path):
    "Catches an instruction that does not work: the file fetched by hand must be enough."
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/published.file).write_bytes(web.body)
    assert len(find_patches(download("sen12ms-summer-s2", tmp_path/"out"))) == 6 and web.log == []


def test_other_layout(published, web, tmp_path, monkeypatch):
    "Catches success reported for an archive whose patches are not where the course looks for them."
    data = make_tar(tmp_path/"other.tar.gz", {"summer/p1.tif": b"1"}).read_bytes()
    web.body = data
    other = Archive(published.file, published.urls, None, hashlib.md5(data).hexdigest(), None, "", "")
    monkeypatch.setitem(ARCHIVES, "sen12ms-summer-s2", other)
    with pytest.raises(FileNotFoundError, match="no s2 patches"): download("sen12ms-summer-s2", tmp_path/"out")
    assert not list((tmp_path/"out").glob("*.done"))


def test_unknown_name(tmp_path):
    "Catches a bare KeyError for a misspelt name."
    with pytest.raises(ValueError, match="unknown archive 'sen12ms-autumn-s2': expected one of sen12ms-spring-lc, .*eurosat-ms"):
        download("sen12ms-autumn-s2", tmp_path)
