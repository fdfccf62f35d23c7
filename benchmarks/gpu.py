"""`make gpu`: what this version can do on an NVIDIA GPU."""

import sys

import torch


def main() -> None:
    """Say what there is to measure."""
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to run")  # noqa: T201  # the command's answer
        return
    sys.exit("this version has no CUDA kernels yet: on a GPU the reference backend serves, and is not worth timing")


if __name__ == "__main__":
    main()
