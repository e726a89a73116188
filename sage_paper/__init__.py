__version__ = "0.1.0"

import os
# Idle OpenMP threads sleep instead of spinning: read when torch is loaded, and a factor of ten where another process uses the same cores.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
