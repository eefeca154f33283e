"""`python -m dali_vit`, so that torchrun and srun can start a worker."""

import sys
from pathlib import Path

# Python puts the working directory first on its path, where a user's own folder `pipelines` or `torch` would be taken
# for the installed one. It is kept if it is the checkout itself, which may be run without being installed.
if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] != str(Path(__file__).parents[1]):
    del sys.path[0]

from dali_vit.cli import run

if __name__ == "__main__":
    run()
