"""`python -m kvloom`, and `torchrun -m kvloom`: the command line."""

from kvloom.cli import main

main()
