__version__ = "0.1.0"

import os
# How long GNU OpenMP's idle threads spin before they sleep; read when torch is loaded. The default is so long that
# two processes on the same cores slow each other down tenfold; this is long enough to cost a process of its own nothing.
os.environ.setdefault('GOMP_SPINCOUNT', '3000')
