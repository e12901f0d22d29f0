"""`python -m dar_lightning` is `dar`."""

from dar_lightning.cli import main

if __name__ == "__main__":
    main()
