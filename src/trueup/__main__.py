"""`python -m trueup`, as torchrun starts it."""

from trueup.cli import main

main()
