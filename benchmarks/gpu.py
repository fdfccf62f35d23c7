"""`make gpu`: what this version can do on an NVIDIA GPU."""

import torch


def main() -> None:
    """Say what there is to measure."""
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to run")  # noqa: T201  # the command's answer
        return
    print("this version has no CUDA kernels: on a GPU the reference backend serves, and is not worth timing")  # noqa: T201


if __name__ == "__main__":
    main()
