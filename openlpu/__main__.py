"""In: `python -m openlpu` and its arguments. Out: what the command `lpu` does."""

from openlpu.cli import main

main()
