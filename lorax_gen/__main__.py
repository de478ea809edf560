"""`python -m lorax_gen`, the same as `lorax-gen`."""

from lorax_gen.cli import main

main()
