"""``python -m h2t_store`` is ``extract``, as ``torchrun -m`` needs it."""

from h2t_store.cli import extract_main

if __name__ == "__main__":
    extract_main()
