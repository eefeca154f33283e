"""`python -m dali_vit`, so that torchrun and srun can start a worker."""

import sys
from pathlib import Path

# Python puts the working directory first, where a folder `pipelines` or `torch` of the user's would be taken for the
# installed one. A checkout that is run without being installed is found by it alone.
if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] != str(Path(__file__).parents[1]):
    del sys.path[0]

from dali_vit.cli import run

if __name__ == "__main__":
    run()
