"""`python -m layerlab.cli` is the command `layerlab`."""

from layerlab.cli.main import main

main()
