"""`python -m dali_vit`, so that torchrun and srun can start a worker."""

from dali_vit.cli import run

if __name__ == "__main__":
    run()
